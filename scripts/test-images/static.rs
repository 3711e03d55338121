//! The only file of the `static` test image: a program without libc, shell or
//! any other file beside it. Tests start it by path and look at what it does.
//!
//! `args A B ..` prints its arguments one per line; `exit N` ends with that
//! code; `sleep SECONDS`; `write PATH TEXT`; `cat PATH`; `env`; `id`; `stdin`
//! copies standard input to standard output; `alloc MIB` touches that much
//! memory.

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

fn run(args: &[String]) -> io::Result<u8> {
    let rest: Vec<&str> = args.iter().skip(2).map(String::as_str).collect();
    let mut out = io::stdout().lock();
    match (args.get(1).map(String::as_str), rest.as_slice()) {
        (Some("args"), words) => {
            for word in words {
                writeln!(out, "{word}")?;
            }
        }
        (Some("exit"), [code]) => return Ok(code.parse().map_err(io::Error::other)?),
        (Some("sleep"), [seconds]) => {
            let seconds = seconds.parse().map_err(io::Error::other)?;
            std::thread::sleep(Duration::from_secs_f64(seconds));
        }
        (Some("write"), [path, text]) => std::fs::write(path, text)?,
        (Some("cat"), [path]) => out.write_all(&std::fs::read(path)?)?,
        (Some("env"), []) => {
            for (name, value) in std::env::vars_os() {
                writeln!(out, "{}={}", name.display(), value.display())?;
            }
        }
        (Some("id"), []) => out.write_all(&std::fs::read("/proc/self/status")?)?,
        (Some("stdin"), []) => {
            io::copy(&mut io::stdin().lock(), &mut out)?;
        }
        (Some("alloc"), [mib]) => {
            let bytes = mib.parse::<usize>().map_err(io::Error::other)? << 20;
            let mut block = vec![0_u8; bytes];
            for page in block.chunks_mut(4096) {
                page[0] = 1;
            }
            writeln!(out, "{}", std::hint::black_box(&block).len())?;
        }
        _ => {
            eprintln!("usage: probe args|exit|sleep|write|cat|env|id|stdin|alloc ..");
            return Ok(64);
        }
    }
    Ok(0)
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    match run(&args) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("probe: {error}");
            ExitCode::from(1)
        }
    }
}
