//! C programs, compiled with `cc`: the tests of `interface.c`, the example, and programs that link `libcuda` too.
//!
//! The tests of the libraries' symbols need `nm`, which comes with the linker.

#![cfg(target_os = "linux")]

use std::collections::BTreeSet;
use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The system's libraries that the static library needs, as `rustc --print native-static-libs` lists them.
const SYSTEM_LIBRARIES: [&str; 4] = ["-lgcc_s", "-lpthread", "-lm", "-ldl"];

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// Returns the folder where cargo puts the libraries that it builds for this test.
fn built() -> PathBuf {
    env::current_exe().unwrap().parent().unwrap().to_owned()
}

fn run<S: AsRef<OsStr>>(program: impl AsRef<OsStr>, arguments: impl IntoIterator<Item = S>) -> String {
    let output = Command::new(&program).args(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{:?}: {}\n{text}{errors}", program.as_ref(), output.status);
    text
}

/// Compiles a C program with warnings as errors, and returns its path.
fn compile(from: &Path, into: &Path, libraries: &[&OsStr]) -> PathBuf {
    let program = into.join("program");
    let mut arguments: Vec<&OsStr> =
        ["-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-o"].map(OsStr::new).to_vec();
    let include = source("include");
    arguments.extend([program.as_os_str(), OsStr::new("-I"), include.as_os_str(), from.as_os_str()]);
    arguments.extend(libraries);
    arguments.push(OsStr::new("-lm"));
    run("cc", arguments);
    program
}

/// Compiles a C program against the shared library.
fn compile_shared(from: &Path, into: &Path) -> PathBuf {
    let (folder, library) = (built(), built().join("libliquidgemm_c.so"));
    let path = format!("-Wl,-rpath,{}", folder.display());
    compile(from, into, &[library.as_os_str(), OsStr::new(&path)])
}

/// Compiles a `libcuda` that counts the calls of `cuInit`, which returns 42.
fn fake_cuda(folder: &Path) -> PathBuf {
    let library = folder.join("libcuda.so.1");
    let from = source("tests/fake_cuda.c");
    let arguments = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o"].map(OsStr::new);
    run("cc", arguments.into_iter().chain([library.as_os_str(), from.as_os_str()]));
    library
}

/// Returns the symbols that a library exports.
fn exported(library: &Path) -> BTreeSet<String> {
    let listed = run("nm", [OsStr::new("-D"), OsStr::new("--defined-only"), library.as_os_str()]);
    listed.lines().filter_map(|line| line.split_whitespace().last()).map(str::to_owned).collect()
}

#[test]
fn the_shared_library_exports_exactly_the_functions_of_the_header() {
    let header = std::fs::read_to_string(source("include/liquidgemm.h")).unwrap();
    let declared: BTreeSet<String> = header
        .match_indices("lg_")
        .map(|(at, _)| &header[at..])
        .filter_map(|text| text.split_once('('))
        .filter(|(name, _)| name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'))
        .map(|(name, _)| name.to_owned())
        .collect();
    assert!(declared.contains("lg_cpu_gemm"));
    let exported = exported(&built().join("libliquidgemm_c.so"));
    // `lg_last_error_message()` and its kin appear in comments too.
    let missing: Vec<_> = declared.difference(&exported).collect();
    assert!(missing.is_empty(), "declared, but not exported: {missing:?}");
    let surplus: Vec<_> = exported.difference(&declared).collect();
    assert!(surplus.is_empty(), "exported, but not declared: {surplus:?}");
}

#[test]
fn the_tests_in_c_pass_with_the_shared_library() {
    let folder = tempfile::tempdir().unwrap();
    let program = compile_shared(&source("tests/interface.c"), folder.path());
    let text = run(program, [folder.path()]);
    assert!(text.ends_with("all passed\n"), "{text}");
}

#[test]
fn the_example_runs() {
    let folder = tempfile::tempdir().unwrap();
    let program = compile_shared(&source("examples/linear.c"), folder.path());
    let text = run(program, [folder.path().join("layer.safetensors")]);
    assert!(text.contains("largest error"), "{text}");
}

#[test]
fn gpu_calls_check_their_arguments_and_launch_on_a_fake_driver() {
    let folder = tempfile::tempdir().unwrap();
    let fake = folder.path().join("libcuda.so.1");
    let mut rustc = Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    rustc.args(["--edition=2024", "--crate-type=cdylib", "--crate-name=fake_cuda", "-o"]).arg(&fake);
    let output = rustc.arg(source("../../tests/fake/libcuda.rs")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let program = compile_shared(&source("tests/fake_gpu.c"), folder.path());
    let launches = |status: &str| {
        let mut run = Command::new(&program);
        run.env("LD_LIBRARY_PATH", folder.path()).env("FAKE_CUDA_LAUNCH", status).output().unwrap()
    };
    let output = launches("0");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "all passed\n", "{errors}");
    // The driver's refusal of a launch arrives with its status.
    let errors = launches("912").stderr;
    assert!(String::from_utf8_lossy(&errors).contains("(CUDA status 912)"));
}

#[test]
fn calls_of_a_program_that_links_libcuda_reach_it_with_the_shared_library() {
    let folder = tempfile::tempdir().unwrap();
    let cuda = fake_cuda(folder.path());
    let (libraries, library) = (built(), built().join("libliquidgemm_c.so"));
    let paths = [&libraries, folder.path()].map(|path| format!("-Wl,-rpath,{}", path.display()));
    // Whichever comes first.
    for order in [[&library, &cuda], [&cuda, &library]] {
        let arguments = order.map(|path| path.as_os_str()).into_iter().chain(paths.iter().map(OsStr::new));
        let program = compile(&source("tests/links_cuda.c"), folder.path(), &arguments.collect::<Vec<_>>());
        assert_eq!(run(program, ["shared"]), "all passed\n");
    }
}

#[test]
fn calls_of_a_program_that_links_libcuda_reach_it_with_the_static_library() {
    let folder = tempfile::tempdir().unwrap();
    let cuda = fake_cuda(folder.path());
    let library = built().join("libliquidgemm_c.a");
    let path = format!("-Wl,-rpath,{}", folder.path().display());
    for order in [[&library, &cuda], [&cuda, &library]] {
        let mut arguments: Vec<&OsStr> = order.map(|path| path.as_os_str()).to_vec();
        arguments.push(OsStr::new(&path));
        arguments.extend(SYSTEM_LIBRARIES.map(OsStr::new));
        let program = compile(&source("tests/links_cuda.c"), folder.path(), &arguments);
        assert_eq!(run(program, ["static"]), "all passed\n");
    }
}

#[test]
fn calls_of_a_rust_program_that_links_libcuda_reach_it() {
    let folder = tempfile::tempdir().unwrap();
    let cuda = fake_cuda(folder.path());
    // The linker looks for this name.
    std::fs::copy(&cuda, folder.path().join("libcuda.so")).unwrap();
    let (deps, program) = (built(), folder.path().join("program"));
    let mut rustc = Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    rustc.args(["--edition=2024", "-o"]).arg(&program).arg(source("tests/links_cuda.rs"));
    rustc.arg("--extern").arg(format!("liquidgemm_c={}", deps.join("libliquidgemm_c.rlib").display()));
    rustc.arg("-L").arg(format!("dependency={}", deps.display()));
    rustc.arg("-L").arg(format!("native={}", folder.path().display()));
    rustc.arg(format!("-Clink-arg=-Wl,-rpath,{}", folder.path().display()));
    let output = rustc.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(run(program, [""; 0]), "all passed\n");
}
