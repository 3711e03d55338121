//! What a sandbox reaches.

use crate::bed::{Bed, busybox, ok, run, sh, told_twice};
use skyrl_sandbox::Network;
use std::net::TcpListener;

async fn nothing_but_itself() {
    let bed = Bed::new().await;
    let guest = bed.start("box", &busybox()).await.unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let links = ok(&sh(&guest, "ls /sys/class/net; ip addr show lo | grep -c UP").await);
    assert_eq!(links, "lo\n1");
    let reached = sh(&guest, &format!("nc -w 1 127.0.0.1 {port} < /dev/null")).await;
    assert!(!reached.success(), "the host's loopback was reached");
    bed.end().await;
}

told_twice!(
    nothing_but_itself,
    by_default_there_is_only_an_own_loopback_as_root,
    by_default_there_is_only_an_own_loopback_as_a_plain_user
);

async fn all_the_host_reaches() {
    let bed = Bed::new().await;
    let mut spec = busybox();
    spec.network = Network::Host;
    let guest = bed.start("box", &spec).await.unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let accepted = std::thread::spawn(move || listener.accept().map(drop));
    ok(&sh(&guest, &format!("nc -w 3 127.0.0.1 {port} < /dev/null")).await);
    accepted.join().unwrap().unwrap();
    bed.end().await;
}

told_twice!(
    all_the_host_reaches,
    the_hosts_network_is_had_when_asked_for_as_root,
    the_hosts_network_is_had_when_asked_for_as_a_plain_user
);

#[test]
fn translation_gives_a_way_out_and_none_to_the_hosts_loopback() {
    run(async {
        let bed = Bed::new().await;
        let mut spec = busybox();
        spec.network = Network::Nat;
        let guest = bed.start("box", &spec).await.unwrap();
        let seen = ok(&sh(&guest, "ip addr show tap0; ip route; cat /etc/resolv.conf").await);
        assert!(seen.contains("10.0.2.100"), "{seen}");
        assert!(seen.contains("default via 10.0.2.2"), "{seen}");
        assert!(seen.contains("nameserver 10.0.2.3"), "{seen}");
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let reached = sh(&guest, &format!("nc -w 2 10.0.2.2 {port} < /dev/null")).await;
        assert!(!reached.success(), "the host's loopback was reached");
        bed.end().await;
    });
}
