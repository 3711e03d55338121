//! What sandboxes reach over the network.

use crate::bed::{Bed, busybox, is_root, ok, processes_of, run, run_as_plain_user, sh};
use skyrl_sandbox::{Engine, EngineError, Network, SandboxSpec};
use std::io::Write;
use std::net::{IpAddr, TcpListener, UdpSocket};

fn connected(network: Network) -> SandboxSpec {
    SandboxSpec {
        network,
        ..busybox()
    }
}

/// An address of this machine that is not its loopback.
fn own_address() -> IpAddr {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    // Nothing is sent: the kernel only chooses the way.
    socket.connect("192.0.2.1:9").unwrap();
    socket.local_addr().unwrap().ip()
}

/// Greets whoever connects, for as long as the test runs.
fn greeter(address: IpAddr) -> u16 {
    let listener = TcpListener::bind((address, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let _ = (&stream).write_all(b"greetings\n");
        }
    });
    port
}

#[test]
fn nat_reaches_out_but_not_to_the_hosts_loopback() {
    assert!(is_root(), "/dev/net/tun is root's here");
    run(async {
        let bed = Bed::new().await;
        let guest = bed.start("box", &connected(Network::Nat)).await.unwrap();
        let address = own_address();
        let port = greeter(address);
        let seen = sh(
            &guest,
            &format!("nc -w 5 {address} {port} </dev/null; cat /etc/resolv.conf"),
        )
        .await;
        let seen = ok(&seen);
        assert!(seen.contains("greetings"), "{seen}");
        assert!(seen.contains("nameserver 10.0.2.3"), "{seen}");
        let port = greeter("127.0.0.1".parse().unwrap());
        for inside in ["127.0.0.1", "10.0.2.2"] {
            let seen = sh(&guest, &format!("nc -w 2 {inside} {port} </dev/null")).await;
            assert!(!seen.stdout.text.contains("greetings"), "reached {inside}");
        }
        let helper = helpers();
        assert_eq!(helper.len(), 1, "{helper:?}");
        bed.engine.destroy(&"box".parse().unwrap()).await.unwrap();
        assert_eq!(helpers(), [] as [i32; 0]);
        bed.end().await;
    });
}

/// Translating programs started by zygotes of this test's process.
fn helpers() -> Vec<i32> {
    processes_of(std::path::Path::new("slirp4netns"))
        .into_iter()
        .filter(|pid| {
            let maps = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&maps).contains("tap0")
        })
        .collect()
}

#[test]
fn the_hosts_network_is_reached_when_asked_for() {
    run(async {
        let bed = Bed::new().await;
        let guest = bed.start("box", &connected(Network::Host)).await.unwrap();
        let port = greeter("127.0.0.1".parse().unwrap());
        let seen = sh(&guest, &format!("nc -w 5 127.0.0.1 {port} </dev/null")).await;
        assert_eq!(ok(&seen), "greetings");
        bed.end().await;
    });
}

#[test]
fn nat_that_can_not_work_is_refused_with_what_is_missing() {
    run_as_plain_user(
        "network::nat_that_can_not_work_is_refused_with_what_is_missing",
        async {
            if std::fs::OpenOptions::new()
                .write(true)
                .open("/dev/net/tun")
                .is_ok()
            {
                return;
            }
            let bed = Bed::new().await;
            let id = "box".parse().unwrap();
            let error = bed
                .engine
                .create(&id, &connected(Network::Nat))
                .await
                .unwrap_err();
            assert!(matches!(error, EngineError::Unusable { .. }), "{error}");
            assert!(error.to_string().contains("/dev/net/tun"), "{error}");
            bed.end().await;
        },
    );
}
