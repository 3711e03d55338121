//! The zygote's system call filter, as container runtimes are told it: so that
//! sandboxes of every engine may make the same calls.

use serde_json::{Value, json};
use skyrl_zygote::seccomp::{AF_ALG, AF_VSOCK, NAMESPACE_FLAGS, PERSONALITIES, allowed, refused};

/// `linux.seccomp` of a container's configuration.
pub(crate) fn profile() -> Value {
    let names = |calls: &mut dyn Iterator<Item = &'static skyrl_zygote::seccomp::Call>| {
        calls
            .map(|call| call.name.to_ascii_lowercase())
            .collect::<Vec<_>>()
    };
    let mut rules = vec![
        json!({"names": names(&mut allowed()), "action": "SCMP_ACT_ALLOW"}),
        json!({
            "names": names(&mut refused()),
            "action": "SCMP_ACT_ERRNO",
            "errnoRet": libc::EPERM,
        }),
        allow("clone", masked(NAMESPACE_FLAGS, 0)),
    ];
    // Any one namespace flag is enough: one rule for each.
    rules.extend(
        (0..u64::BITS)
            .map(|bit| 1u64 << bit)
            .filter(|flag| NAMESPACE_FLAGS & flag != 0)
            .map(|flag| refuse("clone", masked(flag, flag))),
    );
    rules.extend(PERSONALITIES.map(|domain| allow("personality", compare("EQ", domain))));
    // Two conditions on one argument can't be joined by "and": the families
    // between the refused ones are let through piece by piece.
    rules.push(allow("socket", compare("LT", AF_ALG)));
    rules.extend(((AF_ALG + 1)..AF_VSOCK).map(|family| allow("socket", compare("EQ", family))));
    rules.push(allow("socket", compare("GT", AF_VSOCK)));
    rules.extend([AF_ALG, AF_VSOCK].map(|family| refuse("socket", compare("EQ", family))));
    json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": libc::ENOSYS,
        "architectures": [architecture()],
        "syscalls": rules,
    })
}

fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "SCMP_ARCH_X86_64",
        "aarch64" => "SCMP_ARCH_AARCH64",
        "riscv64" => "SCMP_ARCH_RISCV64",
        "powerpc64" => "SCMP_ARCH_PPC64LE",
        _ => "SCMP_ARCH_NATIVE",
    }
}

/// A condition on the first argument.
fn compare(operator: &str, value: u64) -> Value {
    json!({"index": 0, "value": value, "op": format!("SCMP_CMP_{operator}")})
}

/// The first argument has, of the bits of a mask, exactly the given ones.
fn masked(mask: u64, bits: u64) -> Value {
    json!({"index": 0, "value": mask, "valueTwo": bits, "op": "SCMP_CMP_MASKED_EQ"})
}

fn allow(call: &str, condition: Value) -> Value {
    json!({"names": [call], "action": "SCMP_ACT_ALLOW", "args": [condition]})
}

fn refuse(call: &str, condition: Value) -> Value {
    json!({
        "names": [call],
        "action": "SCMP_ACT_ERRNO",
        "errnoRet": libc::EPERM,
        "args": [condition],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_profile_names_calls_as_runtimes_know_them() {
        let profile = profile();
        let rules = profile["syscalls"].as_array().unwrap();
        let names = |rule: usize| -> Vec<&str> {
            let names = rules[rule]["names"].as_array().unwrap();
            names.iter().map(|name| name.as_str().unwrap()).collect()
        };
        assert!(names(0).contains(&"openat") && names(0).contains(&"execve"));
        assert!(names(1).contains(&"mount") && names(1).contains(&"bpf"));
        assert!(
            names(0)
                .iter()
                .all(|name| !name.contains(char::is_uppercase))
        );
        assert_eq!(profile["defaultErrnoRet"], libc::ENOSYS);
    }

    #[test]
    fn every_flag_that_makes_a_namespace_is_refused_by_itself() {
        let profile = profile();
        let refused: u64 = profile["syscalls"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|rule| rule["names"] == json!(["clone"]))
            .filter(|rule| rule["action"] == "SCMP_ACT_ERRNO")
            .map(|rule| rule["args"][0]["value"].as_u64().unwrap())
            .sum();
        assert_eq!(refused, NAMESPACE_FLAGS);
    }
}
