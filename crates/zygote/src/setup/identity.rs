//! Who the sandbox's processes are and what they may do: ids, capabilities,
//! the promise never to gain any.

use crate::step::{Failed, Step};
use rustix::process::{Gid, Uid};
use rustix::thread::{
    CapabilitySet, CapabilitySets, remove_capability_from_bounding_set, set_capabilities,
    set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};
use skyrl_protocol::zygote::{NetworkPlan, StartPlan, UserNamespacePlan};
use std::fs;
use std::path::Path;

/// Capabilities a sandbox's root keeps: the container engines' well-known
/// default without `CAP_MKNOD` (no device cgroup contains it here) and
/// `CAP_AUDIT_WRITE` (the audit log is the host's).
const KEPT: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::NET_RAW)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::SETPCAP)
    .union(CapabilitySet::NET_BIND_SERVICE)
    .union(CapabilitySet::SYS_CHROOT)
    .union(CapabilitySet::KILL);

/// Maps one pair of ids inside onto one outside, the only mapping a user
/// without subordinate ids may make.
pub(crate) fn map_single_id(inside: (u32, u32), outside: (u32, u32)) -> Result<(), Failed> {
    for (file, text) in [
        ("/proc/self/setgroups", "deny".to_owned()),
        (
            "/proc/self/uid_map",
            format!("{} {} 1\n", inside.0, outside.0),
        ),
        (
            "/proc/self/gid_map",
            format!("{} {} 1\n", inside.1, outside.1),
        ),
    ] {
        fs::write(file, text).step("mapping ids in", Path::new(file))?;
    }
    Ok(())
}

/// The capabilities a sandbox's processes can ever have.
fn kept(plan: &StartPlan) -> CapabilitySet {
    if plan.network == NetworkPlan::Host {
        // Raw sockets would read the host's traffic.
        KEPT.difference(CapabilitySet::NET_RAW)
    } else {
        KEPT
    }
}

/// Becomes the plan's user with no more than the kept capabilities, for good.
pub(super) fn give_up_privileges(plan: &StartPlan) -> Result<(), Failed> {
    let kept = kept(plan);
    for bit in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        if kept.contains(capability) {
            continue;
        }
        match remove_capability_from_bounding_set(capability) {
            // Higher than this kernel knows.
            Err(rustix::io::Errno::INVAL) => break,
            result => result.step("giving up capability", &bit.to_string())?,
        }
    }
    set_no_new_privs(true).step("giving up", "new privileges")?;
    let (uid, gid) = (Uid::from_raw(plan.uid), Gid::from_raw(plan.gid));
    if plan.user_namespace == UserNamespacePlan::Host {
        set_thread_groups(&[]).step("leaving", "supplementary groups")?;
    }
    set_thread_res_gid(gid, gid, gid).step("becoming group", &plan.gid.to_string())?;
    set_thread_res_uid(uid, uid, uid).step("becoming user", &plan.uid.to_string())?;
    let held = if plan.uid == 0 {
        kept
    } else {
        CapabilitySet::empty()
    };
    set_capabilities(
        None,
        CapabilitySets {
            effective: held,
            permitted: held,
            inheritable: CapabilitySet::empty(),
        },
    )
    .step("giving up", "capabilities")
}
