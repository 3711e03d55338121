//! Builds the two static helpers, the guest and the zygote, so that one
//! `skyrl` binary carries all it needs. They are compiled by a nested cargo
//! with their own target directory and profile: statically linked, whatever
//! flags this crate is built with.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};

const HELPERS: [(&str, &str); 2] = [
    ("skyrl-guest", "SKYRL_GUEST_PROGRAM"),
    ("skyrl-zygote", "SKYRL_ZYGOTE_PROGRAM"),
];

fn main() {
    let manifest = PathBuf::from(required("CARGO_MANIFEST_DIR"));
    let workspace = manifest.join("../..");
    for part in ["crates/guest", "crates/zygote", "crates/protocol"] {
        for file in ["src", "Cargo.toml"] {
            rerun_if_changed(&workspace.join(part).join(file));
        }
    }
    rerun_if_changed(&workspace.join("Cargo.lock"));
    rerun_if_changed(&manifest.join("build.rs"));

    let target = required("TARGET");
    // OUT_DIR is <target dir>/[triple/]<profile>/build/<package>/out; the
    // helpers' own directory beside the profiles is shared by all of them.
    let out = PathBuf::from(required("OUT_DIR"));
    let target_dir = out
        .ancestors()
        .nth(4)
        .unwrap_or(&out)
        .join("static-helpers");

    let mut cargo = Command::new(required("CARGO"));
    cargo
        .arg("build")
        .arg("--locked")
        .args(["--profile", "static", "--target", &target])
        .arg("--manifest-path")
        .arg(workspace.join("Cargo.toml"))
        .arg("--target-dir")
        .arg(&target_dir);
    for (package, _) in HELPERS {
        cargo.args(["--package", package]);
    }
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        let from_outer_cargo = text.starts_with("CARGO_PROFILE_")
            || text.starts_with("CARGO_FEATURE_")
            || text.starts_with("CARGO_CFG_")
            || matches!(
                text.as_ref(),
                "RUSTFLAGS"
                    | "CARGO_BUILD_RUSTFLAGS"
                    | "CARGO_BUILD_TARGET"
                    | "CARGO_TARGET_DIR"
                    | "RUSTC_WRAPPER"
                    | "RUSTC_WORKSPACE_WRAPPER"
                    | "CLIPPY_ARGS"
                    | "CLIPPY_CONF_DIR"
            );
        if from_outer_cargo {
            cargo.env_remove(&name);
        }
    }
    cargo.env("CARGO_ENCODED_RUSTFLAGS", "-Ctarget-feature=+crt-static");

    match cargo.status() {
        Ok(status) if status.success() => {}
        Ok(status) => fail(&format!(
            "building the static helpers failed ({status}); their errors are above"
        )),
        Err(error) => fail(&format!("can't run cargo for the static helpers: {error}")),
    }
    for (package, variable) in HELPERS {
        let program = target_dir.join(&target).join("static").join(package);
        println!("cargo::rustc-env={variable}={}", program.display());
        rerun_if_changed(&program);
    }
}

fn required(name: &str) -> String {
    match env::var(name) {
        Ok(value) => value,
        Err(error) => fail(&format!("{name}: {error}")),
    }
}

fn rerun_if_changed(path: &Path) {
    println!("cargo::rerun-if-changed={}", path.display());
}

fn fail(message: &str) -> ! {
    eprintln!("error: {message}");
    exit(1)
}
