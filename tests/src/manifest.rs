//! Applies manifests through the API, kind by kind, as `kubectl apply` would: what is missing is created, what is there is patched.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kube::api::{Api, DeleteParams, DynamicObject, Patch, PatchParams, PostParams};
use kube::core::GroupVersionKind;
use kube::discovery::{Scope, pinned_kind};
use kube::{Client, ResourceExt};
use serde_json::Value;

/// How long a deleted object may stay: a Pod stays until its node's agent has stopped it.
pub const DELETE_LIMIT: Duration = Duration::from_secs(30);

/// The objects of a YAML text with any number of documents.
///
/// # Errors
/// When it is not YAML, or a document is not a Kubernetes object.
pub fn parse(yaml: &str) -> Result<Vec<DynamicObject>> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(yaml).context("not YAML")?;
    let objects = documents.into_iter().filter(|document| !document.is_null());
    objects.map(|object| serde_json::from_value(object).context("not a Kubernetes object")).collect()
}

/// Every `.yaml` file of a folder, in the order of their names.
///
/// # Errors
/// When the folder or a file cannot be read, or has no manifest in it.
pub fn read_folder(folder: &Path) -> Result<Vec<DynamicObject>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "yaml"));
    paths.sort();
    ensure!(!paths.is_empty(), "{} holds no .yaml file", folder.display());
    let mut objects = Vec::new();
    for path in paths {
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        objects.extend(parse(&text).with_context(|| path.display().to_string())?);
    }
    Ok(objects)
}

/// Creates the object, or patches the one of that name with everything that `object` says.
///
/// # Errors
/// When the server does not know the kind or refuses the object.
pub async fn apply(client: &Client, object: &DynamicObject) -> Result<()> {
    let api = api_for(client, object).await?;
    let name = object.name_any();
    let described = || format!("cannot apply {} {name}", kind_of(object));
    match api.get_opt(&name).await.with_context(described)? {
        None => api.create(&PostParams::default(), object).await.with_context(described)?,
        Some(_) => api.patch(&name, &PatchParams::default(), &Patch::Merge(object)).await.with_context(described)?,
    };
    Ok(())
}

/// Deletes the object and waits until it is gone, as `kubectl delete` does; one that is not there is no error.
///
/// # Errors
/// When the server refuses, or the object is still there after [`DELETE_LIMIT`].
pub async fn delete(client: &Client, object: &DynamicObject) -> Result<()> {
    let api = api_for(client, object).await?;
    let name = object.name_any();
    let described = || format!("cannot delete {} {name}", kind_of(object));
    let Some(found) = api.get_opt(&name).await.with_context(described)? else { return Ok(()) };
    match api.delete(&name, &DeleteParams::default()).await {
        Err(kube::Error::Api(status)) if status.code == 404 => return Ok(()),
        result => result.with_context(described)?,
    };
    let deadline = Instant::now() + DELETE_LIMIT;
    while api.get_opt(&name).await.with_context(described)?.is_some_and(|now| now.uid() == found.uid()) {
        ensure!(
            Instant::now() < deadline,
            "{} {name} is still there {DELETE_LIMIT:?} after its deletion",
            kind_of(object)
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

async fn api_for(client: &Client, object: &DynamicObject) -> Result<Api<DynamicObject>> {
    let types = object.types.as_ref().context("a manifest lacks apiVersion or kind")?;
    let kind = GroupVersionKind::try_from(types).with_context(|| format!("bad apiVersion {}", types.api_version))?;
    let (resource, capabilities) = pinned_kind(client, &kind)
        .await
        .with_context(|| format!("the API server does not serve {} {}", types.api_version, types.kind))?;
    Ok(match capabilities.scope {
        Scope::Cluster => Api::all_with(client.clone(), &resource),
        Scope::Namespaced => {
            let namespace = object.namespace().unwrap_or_else(|| "default".to_owned());
            Api::namespaced_with(client.clone(), &namespace, &resource)
        }
    })
}

fn kind_of(object: &DynamicObject) -> &str {
    object.types.as_ref().map_or("object", |types| &types.kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_become_objects() {
        let yaml = "---\napiVersion: v1\nkind: Service\nmetadata: {name: a}\n---\n# nothing\n---\napiVersion: v1\nkind: Pod\nmetadata:\n  name: b\n";
        let names: Vec<_> = parse(yaml).unwrap().iter().map(|o| (kind_of(o).to_owned(), o.name_any())).collect();
        assert_eq!(names, [("Service".into(), "a".into()), ("Pod".into(), "b".into())]);
        assert!(parse("a: [").is_err());
        assert!(parse("- 1").is_err());
    }

    #[test]
    fn the_examples_are_manifests() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
        assert!(read_folder(&folder).unwrap().iter().all(|object| object.types.is_some()));
    }
}
