//! The control groups of one sandbox: made, entered, read, frozen, killed,
//! removed. A [`Group`] is plain paths, so it can be written down and used by
//! a later process.

use super::discover::{enable, make_group, read};
use super::{CgroupError, Cgroups, Controller};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What a group bounds.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Bounds {
    /// CPU time per wall time.
    pub cpus: Option<f64>,
    /// Memory in bytes; swap is not granted on top.
    pub memory_bytes: Option<u64>,
    /// Processes and threads.
    pub pids: Option<u32>,
}

/// What a group counted. Absent where nothing counts it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Usage {
    /// CPU time in seconds.
    pub cpu_seconds: Option<f64>,
    /// Memory in bytes, page cache included.
    pub memory_bytes: Option<u64>,
    /// Largest memory so far.
    pub memory_peak_bytes: Option<u64>,
    /// Processes killed for lack of memory.
    pub oom_kills: u64,
    /// Processes and threads.
    pub pids: Option<u64>,
}

/// The groups of one sandbox, one directory per hierarchy.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    v1: BTreeMap<Controller, PathBuf>,
    v2: Option<PathBuf>,
    /// v2 controllers it has.
    v2_controllers: BTreeSet<Controller>,
}

/// CPU bandwidth is given out in periods of this many microseconds.
const CPU_PERIOD_US: u64 = 100_000;

impl Cgroups {
    /// The groups a sandbox named `name` of the owner `key` will have; nothing
    /// is made yet, so that they can be recorded first.
    pub fn plan(&self, key: &str, name: &str) -> Group {
        let below = |parent: &Path| parent.join(owner_group(key)).join(name);
        let mut v1: BTreeMap<Controller, PathBuf> = self
            .v1
            .iter()
            .map(|(controller, parent)| (*controller, below(parent)))
            .collect();
        if self.v2.is_some() {
            // v2's freezer is the better one, and one group fewer to make.
            v1.remove(&Controller::Freezer);
        }
        Group {
            v1,
            v2: self.v2.as_ref().map(|parent| below(&parent.path)),
            v2_controllers: self
                .v2
                .as_ref()
                .map(|parent| parent.controllers.clone())
                .unwrap_or_default(),
        }
    }
}

fn owner_group(key: &str) -> String {
    format!("skyrl-{key}")
}

impl Group {
    /// Makes the groups and sets their bounds.
    ///
    /// # Errors
    /// The first step the kernel refused; what was made until then is
    /// removed again.
    pub fn create(&self, bounds: &Bounds) -> Result<(), CgroupError> {
        self.create_steps(bounds).inspect_err(|_| {
            let _ = self.remove(Duration::ZERO);
        })
    }

    fn create_steps(&self, bounds: &Bounds) -> Result<(), CgroupError> {
        for dir in self.directories() {
            match fs::create_dir(dir) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    self.make_owner_group(dir)?;
                    make_group(dir)?;
                }
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(CgroupError::new("making cgroup", dir, e));
                }
                _ => {}
            }
        }
        if let Some(bytes) = bounds.memory_bytes {
            self.bound_memory(bytes)?;
        }
        if let Some(pids) = bounds.pids {
            let dir = self.holder(Controller::Pids)?;
            write(&dir.join("pids.max"), &pids.to_string())?;
        }
        if let Some(cpus) = bounds.cpus {
            self.bound_cpu(cpus)?;
        }
        Ok(())
    }

    fn make_owner_group(&self, dir: &Path) -> Result<(), CgroupError> {
        let Some(parent) = dir.parent() else {
            return Ok(());
        };
        make_group(parent)?;
        if self.v2.as_deref() == Some(dir) {
            enable(parent, &self.v2_controllers)?;
        }
        Ok(())
    }

    fn bound_memory(&self, bytes: u64) -> Result<(), CgroupError> {
        let dir = self.holder(Controller::Memory)?;
        let value = bytes.to_string();
        if self.is_v1(Controller::Memory) {
            write(&dir.join("memory.limit_in_bytes"), &value)?;
            // Absent when the kernel does not count swap.
            let with_swap = dir.join("memory.memsw.limit_in_bytes");
            if with_swap.exists() {
                write(&with_swap, &value)?;
            } else {
                write(&dir.join("memory.swappiness"), "0")?;
            }
        } else {
            write(&dir.join("memory.max"), &value)?;
            let swap = dir.join("memory.swap.max");
            if swap.exists() {
                write(&swap, "0")?;
            }
        }
        Ok(())
    }

    fn bound_cpu(&self, cpus: f64) -> Result<(), CgroupError> {
        let dir = self.holder(Controller::Cpu)?;
        // The kernel refuses quotas below 1 ms.
        let quota = ((cpus * CPU_PERIOD_US as f64) as u64).max(1_000);
        if self.is_v1(Controller::Cpu) {
            write(&dir.join("cpu.cfs_period_us"), &CPU_PERIOD_US.to_string())?;
            write(&dir.join("cpu.cfs_quota_us"), &quota.to_string())
        } else {
            write(&dir.join("cpu.max"), &format!("{quota} {CPU_PERIOD_US}"))
        }
    }

    fn is_v1(&self, controller: Controller) -> bool {
        self.v1.contains_key(&controller)
    }

    fn find(&self, controller: Controller) -> Option<&Path> {
        self.v1.get(&controller).map(PathBuf::as_path).or_else(|| {
            self.v2
                .as_deref()
                .filter(|_| self.v2_controllers.contains(&controller))
        })
    }

    fn holder(&self, controller: Controller) -> Result<&Path, CgroupError> {
        self.find(controller).ok_or_else(|| {
            CgroupError::new(
                "setting a limit of",
                controller.to_string(),
                io::ErrorKind::Unsupported.into(),
            )
        })
    }

    /// Every directory, each once (v1 controllers may share one).
    pub fn directories(&self) -> BTreeSet<&Path> {
        self.v1_directories()
            .into_iter()
            .chain(self.v2.as_deref())
            .collect()
    }

    /// The v1 directories. A single-threaded process enters one cheapest by
    /// writing `0` to its `tasks`: that is the one move the kernel makes
    /// without stopping every fork and exit on the machine.
    pub fn v1_directories(&self) -> BTreeSet<&Path> {
        self.v1.values().map(PathBuf::as_path).collect()
    }

    /// The v2 directory, to be cloned into.
    pub fn v2_directory(&self) -> Option<&Path> {
        self.v2.as_deref()
    }

    /// The directory that counts memory, which names the group in the
    /// kernel's log.
    pub fn memory_directory(&self) -> Option<&Path> {
        self.find(Controller::Memory)
    }

    /// The file that counts kills for lack of memory.
    pub fn oom_counter(&self) -> Option<PathBuf> {
        let name = if self.is_v1(Controller::Memory) {
            "memory.oom_control"
        } else {
            "memory.events"
        };
        self.memory_directory().map(|dir| dir.join(name))
    }

    /// The v1 freezer's control file.
    pub fn v1_freezer_state(&self) -> Option<PathBuf> {
        self.v1
            .get(&Controller::Freezer)
            .map(|dir| dir.join("freezer.state"))
    }

    /// Moves a process, with all its threads, into the groups.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn add(&self, pid: i32) -> Result<(), CgroupError> {
        for dir in self.directories() {
            write(&dir.join("cgroup.procs"), &pid.to_string())?;
        }
        Ok(())
    }

    /// Processes inside, as the caller's PID namespace numbers them.
    pub fn processes(&self) -> Vec<i32> {
        self.directories()
            .into_iter()
            .filter_map(|dir| fs::read_to_string(dir.join("cgroup.procs")).ok())
            .flat_map(|text| {
                text.lines()
                    .filter_map(|line| line.trim().parse().ok())
                    .collect::<Vec<i32>>()
            })
            .filter(|pid| *pid > 0)
            .collect::<BTreeSet<_>>()
            .into_iter()
            .collect()
    }

    /// Whether [`Group::set_frozen`] can work.
    pub fn can_freeze(&self) -> bool {
        self.v2.is_some() || self.is_v1(Controller::Freezer)
    }

    /// Freezes or thaws every process and waits until that is done.
    ///
    /// # Errors
    /// When there is no freezer, the kernel refuses, or the deadline passes.
    pub fn set_frozen(&self, frozen: Frozen, deadline: Duration) -> Result<(), CgroupError> {
        let until = Instant::now() + deadline;
        let want = frozen == Frozen::Yes;
        let (control, state, value, done): (PathBuf, PathBuf, &str, &str) =
            if let Some(dir) = &self.v2 {
                (
                    dir.join("cgroup.freeze"),
                    dir.join("cgroup.events"),
                    if want { "1" } else { "0" },
                    if want { "frozen 1" } else { "frozen 0" },
                )
            } else {
                let file = match self.v1.get(&Controller::Freezer) {
                    Some(dir) => dir.join("freezer.state"),
                    None => {
                        return Err(CgroupError::new(
                            "freezing without",
                            "a freezer cgroup",
                            io::ErrorKind::Unsupported.into(),
                        ));
                    }
                };
                (
                    file.clone(),
                    file,
                    if want { "FROZEN" } else { "THAWED" },
                    if want { "FROZEN" } else { "THAWED" },
                )
            };
        write(&control, value)?;
        let mut pause = Duration::from_micros(100);
        while !read(&state)?.lines().any(|line| line.trim() == done) {
            if Instant::now() >= until {
                let step = if want { "freezing" } else { "thawing" };
                return Err(CgroupError::new(
                    step,
                    control,
                    io::ErrorKind::TimedOut.into(),
                ));
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(10));
            // v1 may need a second push when a task was forking.
            if self.v2.is_none() {
                write(&control, value)?;
            }
        }
        Ok(())
    }

    /// Whether its processes are frozen.
    pub fn is_frozen(&self) -> bool {
        let (file, mark) = if let Some(dir) = &self.v2 {
            (dir.join("cgroup.freeze"), "1")
        } else if let Some(dir) = self.v1.get(&Controller::Freezer) {
            (dir.join("freezer.state"), "FROZEN")
        } else {
            return false;
        };
        fs::read_to_string(file).is_ok_and(|text| text.trim() == mark)
    }

    /// What it used so far.
    pub fn usage(&self) -> Usage {
        let number =
            |path: PathBuf| -> Option<u64> { fs::read_to_string(path).ok()?.trim().parse().ok() };
        let mut usage = Usage::default();
        if let Some(dir) = self.v1.get(&Controller::CpuAccounting) {
            usage.cpu_seconds = number(dir.join("cpuacct.usage")).map(|ns| ns as f64 / 1e9);
        } else if let Some(dir) = &self.v2 {
            usage.cpu_seconds =
                field(&dir.join("cpu.stat"), "usage_usec").map(|us| us as f64 / 1e6);
        }
        if let Some(dir) = self.find(Controller::Memory) {
            let (now, peak, events) = if self.is_v1(Controller::Memory) {
                (
                    "memory.usage_in_bytes",
                    "memory.max_usage_in_bytes",
                    "memory.oom_control",
                )
            } else {
                ("memory.current", "memory.peak", "memory.events")
            };
            usage.memory_bytes = number(dir.join(now));
            usage.memory_peak_bytes = number(dir.join(peak));
            usage.oom_kills = field(&dir.join(events), "oom_kill").unwrap_or(0);
        }
        if let Some(dir) = self.find(Controller::Pids) {
            usage.pids = number(dir.join("pids.current"));
        }
        usage
    }

    /// Kills every process inside (SIGKILL), thawing first.
    pub fn kill(&self) {
        if self.is_frozen() {
            // A v1-frozen task dies only when thawed.
            let file = match (&self.v2, self.v1.get(&Controller::Freezer)) {
                (Some(dir), _) => Some((dir.join("cgroup.freeze"), "0")),
                (None, Some(dir)) => Some((dir.join("freezer.state"), "THAWED")),
                (None, None) => None,
            };
            if let Some((file, value)) = file {
                let _ = fs::write(file, value);
            }
        }
        if let Some(dir) = &self.v2
            && fs::write(dir.join("cgroup.kill"), "1").is_ok()
        {
            return;
        }
        for pid in self.processes() {
            if let Some(pid) = rustix::process::Pid::from_raw(pid) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
    }

    /// Removes the groups, killing what is inside, within a deadline. What
    /// does not exist counts as removed.
    ///
    /// # Errors
    /// When processes do not die in time.
    pub fn remove(&self, deadline: Duration) -> Result<(), CgroupError> {
        let until = Instant::now() + deadline;
        let mut pause = Duration::from_micros(200);
        loop {
            let mut failed = None;
            for dir in self.directories() {
                match fs::remove_dir(dir) {
                    Err(e) if e.kind() != io::ErrorKind::NotFound => {
                        failed = Some(CgroupError::new("removing cgroup", dir, e));
                    }
                    _ => {}
                }
            }
            let Some(error) = failed else {
                return Ok(());
            };
            if Instant::now() >= until {
                return Err(error);
            }
            self.kill();
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(20));
        }
    }
}

/// Whether processes are to be frozen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frozen {
    /// Stopped.
    Yes,
    /// Running.
    No,
}

/// Removes every group of an owner below recorded parents, killing what is
/// inside. Safe to repeat.
///
/// # Errors
/// The last group that could not be removed within the deadline.
pub fn sweep(parents: &[PathBuf], key: &str, deadline: Duration) -> Result<(), CgroupError> {
    let mut result = Ok(());
    for parent in parents {
        let owner = parent.join(owner_group(key));
        let Ok(entries) = fs::read_dir(&owner) else {
            continue;
        };
        for entry in entries.flatten() {
            if entry.file_type().is_ok_and(|t| t.is_dir())
                && let Err(e) = single(&entry.path()).remove(deadline)
            {
                result = Err(e);
            }
        }
        if let Err(e) = single(&owner).remove(deadline) {
            result = Err(e);
        }
    }
    result
}

/// One directory as a group of its own, of whichever version it is.
fn single(dir: &Path) -> Group {
    if dir.join("cgroup.kill").exists() || dir.join("cgroup.freeze").exists() {
        return Group {
            v2: Some(dir.to_owned()),
            ..Group::default()
        };
    }
    let controller = if dir.join("freezer.state").exists() {
        Controller::Freezer
    } else {
        Controller::CpuAccounting
    };
    Group {
        v1: BTreeMap::from([(controller, dir.to_owned())]),
        ..Group::default()
    }
}

fn write(path: &Path, value: &str) -> Result<(), CgroupError> {
    fs::write(path, value).map_err(|e| CgroupError::new("writing to", path, e))
}

/// A `name value` line of a flat-keyed file.
fn field(path: &Path, name: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.lines().find_map(|line| {
        line.strip_prefix(name)?
            .strip_prefix(' ')?
            .trim()
            .parse()
            .ok()
    })
}
