//! Lists, pages and watches: what versions mean, and that nothing is missed or seen twice.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a failed step fails the test")]

mod common;

use apiserver_store::{Revision, Store as _};
use common::{Api, CONFIG_MAPS, PODS, config_map, pod};
use serde_json::{Value, json};

const TABLE: &str = "application/json;as=Table;v=v1;g=meta.k8s.io";
const METADATA: &str = "application/json;as=PartialObjectMetadata;v=v1;g=meta.k8s.io";

async fn fill(api: &Api, count: usize) {
    for n in 0..count {
        let mut object = config_map(&format!("c{n:02}"));
        object["metadata"]["labels"] = json!({"odd": (n % 2 == 1).to_string()});
        api.post(CONFIG_MAPS, &object).await.expect(201);
    }
}

fn names(list: &Value) -> Vec<String> {
    list["items"].as_array().unwrap().iter().map(|item| item["metadata"]["name"].as_str().unwrap().to_owned()).collect()
}

fn event(kind: &str, name: &str) -> (String, String) {
    (kind.to_owned(), name.to_owned())
}

#[tokio::test]
async fn pages_are_one_consistent_list() {
    let api = Api::start().await;
    fill(&api, 7).await;
    let first = api.get(&format!("{CONFIG_MAPS}?limit=3")).await.expect(200);
    assert_eq!((names(&first).len(), &first["metadata"]["remainingItemCount"]), (3, &json!(4)));
    assert_eq!(first["kind"], "ConfigMapList");
    api.post(CONFIG_MAPS, &config_map("c99")).await.expect(201);
    api.delete(&format!("{CONFIG_MAPS}/c05"), json!(null)).await.expect(200);
    let mut all = names(&first);
    let mut token = first["metadata"]["continue"].as_str().unwrap().to_owned();
    while !token.is_empty() {
        let page = api.get(&format!("{CONFIG_MAPS}?limit=3&continue={token}")).await.expect(200);
        assert_eq!(page["metadata"]["resourceVersion"], first["metadata"]["resourceVersion"]);
        all.extend(names(&page));
        token = page["metadata"]["continue"].as_str().unwrap_or_default().to_owned();
    }
    assert_eq!(all, (0..7).map(|n| format!("c{n:02}")).collect::<Vec<_>>());
}

#[tokio::test]
async fn an_expired_page_can_be_continued_inconsistently() {
    let api = Api::start().await;
    fill(&api, 4).await;
    let first = api.get(&format!("{CONFIG_MAPS}?limit=2")).await.expect(200);
    let token = first["metadata"]["continue"].as_str().unwrap();
    api.post(CONFIG_MAPS, &config_map("c99")).await.expect(201);
    api.store.compact(api.revision().await).await.unwrap();
    let expired = api.get(&format!("{CONFIG_MAPS}?limit=9&continue={token}")).await;
    expired.refused(410, "Expired");
    let token = expired.json()["metadata"]["continue"].as_str().unwrap().to_owned();
    let rest = api.get(&format!("{CONFIG_MAPS}?limit=9&continue={token}")).await.expect(200);
    assert_eq!(names(&rest), ["c02", "c03", "c99"]);
    let old = first["metadata"]["resourceVersion"].as_str().unwrap();
    api.get(&format!("{CONFIG_MAPS}?resourceVersion={old}&resourceVersionMatch=Exact")).await.refused(410, "Expired");
}

#[tokio::test]
async fn selectors_and_limits_go_together() {
    let api = Api::start().await;
    fill(&api, 9).await;
    let odd = format!("{CONFIG_MAPS}?labelSelector=odd%3Dtrue");
    assert_eq!(names(&api.get(&odd).await.expect(200)), ["c01", "c03", "c05", "c07"]);
    let page = api.get(&format!("{odd}&limit=3")).await.expect(200);
    assert_eq!(names(&page), ["c01", "c03", "c05"]);
    assert!(page["metadata"].get("remainingItemCount").is_none());
    let token = page["metadata"]["continue"].as_str().unwrap();
    let rest = api.get(&format!("{odd}&limit=3&continue={token}")).await.expect(200);
    assert_eq!(names(&rest), ["c07"]);
    let one = api.get(&format!("{CONFIG_MAPS}?fieldSelector=metadata.name%3Dc04")).await.expect(200);
    assert_eq!(names(&one), ["c04"]);
    let others = api.get("/api/v1/configmaps?fieldSelector=metadata.namespace%3Dkube-system").await.expect(200);
    assert_eq!(names(&others), Vec::<String>::new());
}

#[tokio::test]
async fn versions_of_reads() {
    let api = Api::start().await;
    fill(&api, 2).await;
    let now = api.revision().await.0;
    for version in [format!("resourceVersion={now}"), "resourceVersion=0".to_owned(), String::new()] {
        assert_eq!(names(&api.get(&format!("{CONFIG_MAPS}?{version}")).await.expect(200)).len(), 2);
    }
    let before = format!("{CONFIG_MAPS}?resourceVersion={}&resourceVersionMatch=Exact", now - 1);
    assert_eq!(names(&api.get(&before).await.expect(200)), ["c00"]);
    let future = api.get(&format!("{CONFIG_MAPS}?resourceVersion={}", now + 1000)).await;
    let message = future.refused(504, "Timeout");
    assert_eq!(message, format!("Timeout: Too large resource version: {}, current: {now}", now + 1000));
    assert_eq!(future.json()["details"]["causes"][0]["reason"], "ResourceVersionTooLarge");
}

#[tokio::test]
async fn a_list_can_be_a_table_or_metadata() {
    let api = Api::start().await;
    api.post(PODS, &pod("p")).await.expect(201);
    let table = api.send("GET", PODS, &[("accept", TABLE)], "").await.expect(200);
    assert_eq!((&table["kind"], &table["rows"][0]["cells"][0]), (&json!("Table"), &json!("p")));
    assert_eq!(table["rows"][0]["object"]["kind"], "PartialObjectMetadata");
    let metadata = api.send("GET", PODS, &[("accept", METADATA)], "").await.expect(200);
    assert_eq!(metadata["kind"], "PartialObjectMetadataList");
    assert_eq!(metadata["items"][0]["metadata"]["name"], "p");
    assert!(metadata["items"][0].get("spec").is_none());
    let single = api.send("GET", &format!("{PODS}/p"), &[("accept", METADATA)], "").await.expect(200);
    assert_eq!(single["kind"], "PartialObjectMetadata");
}

#[tokio::test]
async fn a_long_list_arrives_whole() {
    let api = Api::start().await;
    let filler = "x".repeat(40_000);
    for n in 0..20 {
        let mut object = config_map(&format!("c{n:02}"));
        object["data"]["k"] = json!(filler);
        api.post(CONFIG_MAPS, &object).await.expect(201);
    }
    let list = api.get(CONFIG_MAPS).await.expect(200);
    assert_eq!(list["items"].as_array().unwrap().len(), 20);
    assert!(list["items"].as_array().unwrap().iter().all(|item| item["data"]["k"].as_str() == Some(&filler)));
}

#[tokio::test]
async fn a_watch_begins_where_it_is_told() {
    let api = Api::start().await;
    fill(&api, 1).await;
    let now = api.revision().await;
    let mut unset = api.watch(&format!("{CONFIG_MAPS}?watch=true")).await;
    let mut zero = api.watch(&format!("{CONFIG_MAPS}?watch=true&resourceVersion=0")).await;
    let mut exact = api.watch(&format!("{CONFIG_MAPS}?watch=true&resourceVersion={now}")).await;
    api.post(CONFIG_MAPS, &config_map("new")).await.expect(201);
    for watch in [&mut unset, &mut zero] {
        assert_eq!(watch.next_name().await, event("ADDED", "c00"));
        assert_eq!(watch.next_name().await, event("ADDED", "new"));
    }
    let added = exact.next().await.unwrap();
    assert_eq!((&added["type"], &added["object"]["metadata"]["name"]), (&json!("ADDED"), &json!("new")));
    assert_eq!(added["object"]["metadata"]["resourceVersion"], (now.0 + 1).to_string());
    api.patch(&format!("{CONFIG_MAPS}/new"), "merge", &json!({"data": {"k": "2"}})).await.expect(200);
    api.delete(&format!("{CONFIG_MAPS}/new"), json!(null)).await.expect(200);
    assert_eq!(exact.next_name().await, event("MODIFIED", "new"));
    let deleted = exact.next().await.unwrap();
    assert_eq!((&deleted["type"], &deleted["object"]["data"]["k"]), (&json!("DELETED"), &json!("2")));
    assert_eq!(deleted["object"]["metadata"]["resourceVersion"], (now.0 + 3).to_string());
}

#[tokio::test]
async fn watch_list_announces_its_end() {
    let api = Api::start().await;
    fill(&api, 2).await;
    let query = "watch=1&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true";
    let mut watch = api.watch(&format!("{CONFIG_MAPS}?{query}")).await;
    assert_eq!(watch.next_name().await, event("ADDED", "c00"));
    assert_eq!(watch.next_name().await, event("ADDED", "c01"));
    let bookmark = watch.next().await.unwrap();
    assert_eq!(bookmark["type"], "BOOKMARK");
    assert_eq!(bookmark["object"]["kind"], "ConfigMap");
    assert_eq!(bookmark["object"]["metadata"]["annotations"]["k8s.io/initial-events-end"], "true");
    assert_eq!(bookmark["object"]["metadata"]["resourceVersion"], api.revision().await.to_string());
    api.post(CONFIG_MAPS, &config_map("later")).await.expect(201);
    assert_eq!(watch.next_name().await, event("ADDED", "later"));
    let without = "watch=1&sendInitialEvents=false&resourceVersionMatch=NotOlderThan";
    let mut watch = api.watch(&format!("{CONFIG_MAPS}?{without}")).await;
    api.post(CONFIG_MAPS, &config_map("latest")).await.expect(201);
    assert_eq!(watch.next_name().await, event("ADDED", "latest"));
}

#[tokio::test]
async fn a_watch_ends_in_time_after_a_bookmark() {
    let api = Api::start().await;
    let now = api.revision().await;
    let query = format!("watch=1&allowWatchBookmarks=true&timeoutSeconds=3&resourceVersion={now}");
    let mut watch = api.watch(&format!("{CONFIG_MAPS}?{query}")).await;
    api.post(PODS, &pod("elsewhere")).await.expect(201);
    let bookmark = watch.next().await.unwrap();
    assert_eq!(
        (&bookmark["type"], bookmark["object"]["metadata"]["resourceVersion"].as_str()),
        (&json!("BOOKMARK"), Some((now.0 + 1).to_string().as_str()))
    );
    assert_eq!(watch.next().await, None);
}

#[tokio::test]
async fn a_watch_from_the_lost_past_or_the_future_is_told() {
    let api = Api::start().await;
    fill(&api, 3).await;
    let now = api.revision().await;
    api.store.compact(now).await.unwrap();
    let mut past = api.watch(&format!("{CONFIG_MAPS}?watch=1&resourceVersion={}", now.0 - 1)).await;
    let error = past.next().await.unwrap();
    assert_eq!(
        (&error["type"], &error["object"]["code"], &error["object"]["reason"]),
        (&json!("ERROR"), &json!(410), &json!("Expired"))
    );
    assert_eq!(past.next().await, None);
    let mut future = api.watch(&format!("{CONFIG_MAPS}?watch=1&resourceVersion={}", now.0 + 1000)).await;
    let error = future.next().await.unwrap();
    assert_eq!((&error["type"], &error["object"]["code"]), (&json!("ERROR"), &json!(504)));
}

#[tokio::test]
async fn objects_enter_and_leave_a_selection() {
    let api = Api::start().await;
    let mut watch = api.watch(&format!("{CONFIG_MAPS}?watch=1&labelSelector=on%3Dyes")).await;
    let path = format!("{CONFIG_MAPS}/a");
    api.post(CONFIG_MAPS, &config_map("a")).await.expect(201);
    api.patch(&path, "merge", &json!({"metadata": {"labels": {"on": "yes"}}})).await.expect(200);
    api.patch(&path, "merge", &json!({"data": {"k": "2"}})).await.expect(200);
    api.patch(&path, "merge", &json!({"metadata": {"labels": {"on": "no"}}})).await.expect(200);
    api.delete(&path, json!(null)).await.expect(200);
    api.post(CONFIG_MAPS, &{
        let mut object = config_map("b");
        object["metadata"]["labels"] = json!({"on": "yes"});
        object
    })
    .await
    .expect(201);
    for (kind, name) in [("ADDED", "a"), ("MODIFIED", "a")] {
        assert_eq!(watch.next_name().await, event(kind, name));
    }
    let left = watch.next().await.unwrap();
    assert_eq!(left["type"], "DELETED");
    assert_eq!(left["object"]["metadata"]["labels"]["on"], "yes", "the last state that matched");
    assert_eq!(watch.next_name().await, event("ADDED", "b"));
}

#[tokio::test]
async fn a_watch_of_one_object_sees_only_it() {
    let api = Api::start().await;
    fill(&api, 2).await;
    let mut by_field = api.watch(&format!("{CONFIG_MAPS}?watch=1&fieldSelector=metadata.name%3Dc01")).await;
    let mut by_path = api.watch(&format!("{CONFIG_MAPS}/c01?watch=1")).await;
    api.delete(&format!("{CONFIG_MAPS}/c00"), json!(null)).await.expect(200);
    api.delete(&format!("{CONFIG_MAPS}/c01"), json!(null)).await.expect(200);
    for watch in [&mut by_field, &mut by_path] {
        assert_eq!(watch.next_name().await, event("ADDED", "c01"));
        assert_eq!(watch.next_name().await, event("DELETED", "c01"));
    }
}

#[tokio::test]
async fn a_watch_can_be_a_table() {
    let api = Api::start().await;
    let mut watch = api.watch_as(&format!("{PODS}?watch=1"), TABLE).await;
    api.post(PODS, &pod("p")).await.expect(201);
    api.post(PODS, &pod("q")).await.expect(201);
    let first = watch.next().await.unwrap();
    assert_eq!((&first["object"]["kind"], &first["object"]["rows"][0]["cells"][0]), (&json!("Table"), &json!("p")));
    assert!(first["object"]["columnDefinitions"].is_array());
    let second = watch.next().await.unwrap();
    assert_eq!(
        (&second["object"]["columnDefinitions"], &second["object"]["rows"][0]["cells"][0]),
        (&json!(null), &json!("q"))
    );
}

#[tokio::test]
async fn both_event_apis_show_the_same_events() {
    let api = Api::start().await;
    let sent = json!({"apiVersion": "v1", "kind": "Event", "metadata": {"name": "e"}, "message": "m", "reason": "r", "type": "Normal",
        "involvedObject": {"kind": "Pod", "name": "p", "namespace": "default"}});
    api.post("/api/v1/namespaces/default/events", &sent).await.expect(201);
    let newer = api.get("/apis/events.k8s.io/v1/namespaces/default/events/e").await.expect(200);
    assert_eq!(
        (&newer["note"], &newer["regarding"]["name"], &newer["apiVersion"]),
        (&json!("m"), &json!("p"), &json!("events.k8s.io/v1"))
    );
    let list = api.get("/apis/events.k8s.io/v1/namespaces/default/events").await.expect(200);
    assert_eq!((&list["kind"], &list["items"][0]["note"]), (&json!("EventList"), &json!("m")));
    let chosen = api.get("/api/v1/namespaces/default/events?fieldSelector=involvedObject.name%3Dp").await.expect(200);
    assert_eq!(names(&chosen), ["e"]);
}

#[tokio::test]
async fn watches_end_when_the_server_stops() {
    let api = Api::start().await;
    let mut watch = api.watch(&format!("{CONFIG_MAPS}?watch=1&resourceVersion={}", api.revision().await)).await;
    api.stop().await;
    assert_eq!(watch.next().await, None);
}

#[tokio::test]
async fn documents_of_the_server() {
    let api = Api::start().await;
    assert_eq!(api.get("/version").await.expect(200)["minor"], "36");
    assert_eq!(api.get("/api").await.expect(200)["versions"], json!(["v1"]));
    assert_eq!(api.get("/api/v1").await.expect(200)["kind"], "APIResourceList");
    let aggregated =
        [("accept", "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList,application/json")];
    let answer = api.send("GET", "/apis", &aggregated, "").await;
    assert_eq!(answer.expect(200)["kind"], "APIGroupDiscoveryList");
    assert_eq!(answer.headers["content-type"], aggregated[0].1.split(',').next().unwrap());
    let etag = answer.headers["etag"].to_str().unwrap();
    assert_eq!(api.send("GET", "/apis", &[aggregated[0], ("if-none-match", etag)], "").await.code, 304);
    let index = api.get("/openapi/v3").await.expect(200);
    let url = index["paths"]["api/v1"]["serverRelativeURL"].as_str().unwrap().to_owned();
    assert!(api.get(&url).await.expect(200)["components"]["schemas"].is_object());
    assert_eq!(api.get("/openapi/v3/api/v1?hash=old").await.code, 301);
    assert_eq!(api.get("/openapi/v2").await.expect(200)["swagger"], "2.0");
    let metrics = api.get("/metrics").await;
    let text = String::from_utf8(metrics.body.to_vec()).unwrap();
    assert!(text.contains(&format!("apiserver_store_revision {}", api.revision().await)), "{text}");
    assert_eq!(api.revision().await, Revision(api.store.usage().revision.0));
}
