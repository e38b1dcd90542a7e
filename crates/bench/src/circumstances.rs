//! The circumstances of a measurement: GPU, driver, date, kernels and command line.
//! Every recorded result carries them, because times can't be interpreted without them.

use std::ffi::{CStr, c_char, c_int};
use std::time::{SystemTime, UNIX_EPOCH};

use libloading::{Library, Symbol};
use serde::{Deserialize, Serialize};

use liquidgemm::gpu::{self, Gpu};

/// GPU, driver, date, kernels and command line of a measurement.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Circumstances {
    /// Description of the GPU; its name comes first and ends at the first comma.
    pub device: String,
    /// Version of NVIDIA's driver.
    pub driver: String,
    /// The date in UTC, such as `2026-11-22`.
    pub date: String,
    /// Version of this workspace.
    pub version: String,
    /// Hash of the device sources from which the kernels were built.
    pub kernels: String,
    /// The command line.
    pub command: String,
}

impl Circumstances {
    /// The circumstances of this process on a GPU.
    pub(super) fn of(gpu: &Gpu) -> Self {
        Self {
            device: gpu.description(),
            driver: driver_version(),
            date: today(),
            version: env!("CARGO_PKG_VERSION").into(),
            kernels: gpu::ptx_hash().into(),
            command: command(),
        }
    }

    /// The GPU's name without the rest of the description.
    pub(super) fn device_name(&self) -> &str {
        self.device.split(',').next().unwrap_or_default()
    }
}

/// The version of NVIDIA's driver, such as `580.159.04`.
fn driver_version() -> String {
    driver_from_proc().or_else(driver_from_nvml).unwrap_or_else(|| "unknown".into())
}

fn driver_from_proc() -> Option<String> {
    version_in(&std::fs::read_to_string("/proc/driver/nvidia/version").ok()?)
}

/// The first word of `text` that consists of two or more numbers separated by dots.
fn version_in(text: &str) -> Option<String> {
    let is_version = |word: &&str| {
        let parts: Vec<&str> = word.split('.').collect();
        parts.len() >= 2
            && parts.iter().all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()))
    };
    text.split_whitespace().find(is_version).map(str::to_owned)
}

/// Asks NVIDIA's management library, because containers often have it but hide `/proc/driver`.
fn driver_from_nvml() -> Option<String> {
    // SAFETY: the library is NVIDIA's, loaded under its own name.
    let library = unsafe { Library::new("libnvidia-ml.so.1") }.ok()?;
    let mut text: [c_char; 96] = [0; 96];
    // SAFETY: the symbols have these signatures in every version of the library.
    // The buffer is one byte longer than the given length and starts zeroed, so its text ends with a NUL.
    unsafe {
        let start: Symbol<'_, unsafe extern "C" fn() -> c_int> = library.get(b"nvmlInit_v2\0").ok()?;
        let version: Symbol<'_, unsafe extern "C" fn(*mut c_char, u32) -> c_int> =
            library.get(b"nvmlSystemGetDriverVersion\0").ok()?;
        if start() != 0 || version(text.as_mut_ptr(), text.len() as u32 - 1) != 0 {
            return None;
        }
        Some(CStr::from_ptr(text.as_ptr()).to_string_lossy().into_owned())
    }
}

/// Today's date in UTC, such as `2026-11-22`.
fn today() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    let (year, month, day) = civil(seconds / 86_400);
    format!("{year}-{month:02}-{day:02}")
}

/// Converts days since 1970-01-01 to year, month and day.
fn civil(mut days: u64) -> (u64, u64, u64) {
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let mut year = 1970;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let february = 28 + u64::from(leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    (year, month, days + 1)
}

/// The command line, without the directories of the program and of absolute paths.
fn command() -> String {
    let mut arguments = std::env::args();
    let program = arguments.next().unwrap_or_default();
    let program = program.rsplit(['/', '\\']).next().unwrap_or_default().to_owned();
    let arguments = arguments.map(|argument| without_directories(&argument));
    std::iter::once(program).chain(arguments).collect::<Vec<_>>().join(" ")
}

/// Returns an argument in which absolute paths, of which there may be several behind commas or `=`, have only their last part.
fn without_directories(argument: &str) -> String {
    argument
        .split_inclusive([',', '='])
        .map(|part| {
            let is_absolute = part.starts_with('/') && part.trim_end_matches(['/', ',', '=']).len() > 1;
            if is_absolute { part.trim_end_matches('/').rsplit('/').next().unwrap_or(part) } else { part }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absolute_paths_lose_their_directories() {
        for (argument, expected) in [
            ("/data/out/moe.json", "moe.json"),
            ("--json=/a/b.json", "--json=b.json"),
            ("/a/b.json,/c/d.json", "b.json,d.json"),
            ("/usr/bin/python3", "python3"),
            ("out/moe.json", "out/moe.json"),
            ("--moe", "--moe"),
            ("4096x4096,1x/2", "4096x4096,1x/2"),
            ("/plots/", "plots"),
            ("/", "/"),
        ] {
            assert_eq!(without_directories(argument), expected);
        }
    }

    #[test]
    fn days_become_dates() {
        assert_eq!(civil(0), (1970, 1, 1));
        assert_eq!(civil(19_782), (2024, 2, 29));
        assert_eq!(civil(19_783), (2024, 3, 1));
        assert_eq!(civil(20_088), (2024, 12, 31));
        assert_eq!(civil(20_089), (2025, 1, 1));
    }

    #[test]
    fn driver_version_is_found_in_either_wording() {
        let text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54.03  Tue Jun 6 22:20:39 UTC 2023";
        assert_eq!(version_in(text).unwrap(), "535.54.03");
        let open = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build";
        assert_eq!(version_in(open).unwrap(), "580.159.04");
        assert_eq!(version_in("nothing here"), None);
    }
}
