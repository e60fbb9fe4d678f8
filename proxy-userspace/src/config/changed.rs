//! Notices that the configuration file was changed. As kube-proxy does (`cmd/kube-proxy/app/options.go`), the process then ends,
//! and whoever supervises it starts it with the new file; traffic goes on meanwhile.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tracing::warn;

use super::{Config, Flags};

/// How often the file is read. Its bytes are compared, not its times: a ConfigMap's volume swaps links, and editors swap files.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Resolves with the name of the file that `flags` name when its content differs from what it was at the first poll and is a
/// valid configuration; never without a file. A content that is not valid is told once and waited out: a process that runs well
/// is not ended for one that could not start.
pub async fn file_changed(flags: &Flags) -> PathBuf {
    let Some(path) = flags.file() else { return std::future::pending().await };
    let mut known = content(&path);
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let now = content(&path);
        if now == known || now.is_none() {
            continue;
        }
        match Config::load(flags) {
            Ok(_) => return path,
            Err(error) => {
                warn!(%error, "the configuration file was changed and is not valid, going on with the old one");
            }
        }
        known = now;
    }
}

/// `None` while there is no such file: it is being replaced.
fn content(path: &Path) -> Option<Vec<u8>> {
    std::fs::read(path).ok()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const WAIT: Duration = Duration::from_secs(60);

    fn document(zone: &str) -> String {
        format!("apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nclusterCIDR: {zone}\n")
    }

    #[tokio::test(start_paused = true)]
    async fn only_a_valid_change_of_the_file_counts() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.yaml");
        fs::write(&path, document("10.1.0.0/16")).unwrap();
        let flags = Flags { config: path.display().to_string(), ..Flags::read(["trama-proxy".into()]).unwrap() };
        let mut changed = Box::pin(file_changed(&flags));
        let mut quiet = async |why: &str| {
            assert!(tokio::time::timeout(WAIT, &mut changed).await.is_err(), "{why}");
        };
        quiet("nothing has happened").await;
        fs::write(&path, document("10.1.0.0/16")).unwrap();
        quiet("the same bytes again").await;
        fs::remove_file(&path).unwrap();
        quiet("it is being replaced").await;
        fs::write(&path, document("nonsense")).unwrap();
        quiet("it could not start").await;
        fs::write(&path, document("10.2.0.0/16")).unwrap();
        assert_eq!(tokio::time::timeout(WAIT, changed).await.unwrap(), path);
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_file_nothing_changes() {
        let flags = Flags::read(["trama-proxy".into()]).unwrap();
        assert!(tokio::time::timeout(WAIT, file_changed(&flags)).await.is_err());
    }
}
