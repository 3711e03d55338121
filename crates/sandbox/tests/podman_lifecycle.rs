//! The podman engine against real Podman: the life of a sandbox.

mod podman_support;

use podman_support::{Place, groups, id, out, sh, start, traces, unique};
use skyrl_sandbox::{Engine, EngineError, Liveness};

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_lives_and_leaves_nothing() {
    let place = Place::new();
    let engine = place.engine().await;
    let mut spec = place.spec();
    spec.env.insert("GREETING".into(), "hello".into());
    spec.workdir = Some("/work/deep".into());
    let name = unique("life");
    let guest = start(&engine, &name, &spec).await;
    assert_eq!(
        out(&guest, "echo $GREETING; pwd; hostname; id -u").await,
        format!("hello\n/work/deep\n{name}\n0")
    );
    assert_eq!(
        engine.liveness(&id(&name)).await.unwrap(),
        Liveness::Running
    );
    assert!(matches!(
        engine.create(&id(&name), &spec).await,
        Err(EngineError::Exists(_))
    ));
    assert!(!sh(&guest, "exit 3").await.success());
    engine.destroy(&id(&name)).await.unwrap();
    engine.destroy(&id(&name)).await.unwrap();
    assert!(groups(&name).is_empty());
    assert!(!place.lock.dir().sandbox(&id(&name)).exists());
    engine.shutdown().await.unwrap();
    assert_eq!(traces(place.dir.path()), Vec::<String>::new());
}
