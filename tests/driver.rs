//! What the library reports on machines without a usable driver or GPU, and for bad calls. No GPU is needed.
//!
//! Each check runs in a child process of its own.
//! For most checks, that process finds a fake `libcuda.so.1` (`fake/libcuda.rs`),
//! which reports the driver and the GPUs that the check asks for.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::LazyLock;

use libtest_mimic::{Arguments, Failed, Trial};
use liquidgemm::gpu::{
    AllReduce, CombineOperands, Communicator, DEVICE_VARIABLE, DeviceRowIndex, DeviceSpan, DeviceWeights,
    Gpu, GpuError, GroupedOperands, LinearInput, LinearOutput, NCCL_VARIABLE, Operands, Partials, Reduction,
    RowParallelCall, RowParallelLinear, StreamHandle, UniqueId, nccl_version,
};
use liquidgemm::{
    Backend, Error, Group, HalfType, Linear, OutputType, PackedWeights, Plan, Problem, QuantizedActivations,
    TileConfig, cpu,
};
use liquidgemm_format::tile::TILE_SHAPES;
use liquidgemm_gpu_tests::refused::{REFUSED_SHAPE, refused_calls};

/// The library that the loader finds as `libcuda.so.1`.
#[derive(Clone, Copy, PartialEq)]
enum Library {
    /// The machine's own driver, if it has one.
    TheMachines,
    /// A file that is not a shared library.
    Broken,
    /// The fake driver, with these environment variables.
    Fake(&'static [(&'static str, &'static str)]),
    /// The fake driver without `cuLaunchKernelEx`, which older drivers lack.
    FakeWithoutLaunch,
    /// The fake driver with two GPUs whose launches succeed, and the fake NCCL, with these environment variables.
    FakeWithNccl(&'static [(&'static str, &'static str)]),
}

/// A check: the property that it checks (its name), the driver that it needs, and its function.
type Check = (&'static str, Library, fn() -> Result<(), Failed>);

const CHECKS: [Check; 28] = [
    ("without_a_driver_the_error_says_what_to_install", Library::TheMachines, no_driver),
    ("a_broken_driver_is_not_reported_as_missing", Library::Broken, broken_driver),
    ("a_driver_before_cuda_12_is_too_old", Library::Fake(&[("FAKE_CUDA_VERSION", "11080")]), driver_too_old),
    (
        "a_driver_of_cuda_12_1_is_new_enough",
        Library::Fake(&[("FAKE_CUDA_VERSION", "12010")]),
        driver_just_new,
    ),
    ("a_driver_that_finds_no_gpu_is_an_error", Library::Fake(&[("FAKE_CUDA_DEVICES", "0")]), no_device),
    (
        "a_driver_that_starts_without_a_gpu_is_an_error",
        Library::Fake(&[("FAKE_CUDA_INIT", "100")]),
        no_device,
    ),
    ("a_driver_that_does_not_start_is_an_error", Library::Fake(&[("FAKE_CUDA_INIT", "999")]), driver_fails),
    ("an_ampere_gpu_is_refused", Library::Fake(&[("FAKE_CUDA_CAPABILITY", "80")]), wrong_device::<8, 0>),
    ("a_blackwell_gpu_is_refused", Library::Fake(&[("FAKE_CUDA_CAPABILITY", "100")]), wrong_device::<10, 0>),
    (
        "a_driver_without_cluster_launches_names_the_missing_function",
        Library::FakeWithoutLaunch,
        missing_function,
    ),
    ("a_gpu_beyond_the_last_does_not_exist", Library::Fake(&[("FAKE_CUDA_DEVICES", "2")]), no_such_device),
    ("without_a_current_context_there_is_no_current_gpu", Library::Fake(&[]), no_context),
    ("prepared_shapes_load_no_kernel_later", Library::Fake(&[]), prepared),
    ("bad_calls_are_refused_before_the_launch", Library::Fake(&[]), bad_calls),
    ("weights_and_workspaces_outlive_their_gpu_and_are_freed_on_any_thread", WORKING, freed_anywhere),
    ("the_callers_context_stays_current", TWO_GPUS, current_context),
    ("another_gpus_weights_and_workspace_are_refused", TWO_GPUS, other_gpu),
    ("a_call_without_tokens_launches_nothing", WORKING, no_tokens),
    ("any_driver_call_may_fail", WORKING, any_failure),
    (
        "the_first_usable_gpu_is_taken",
        Library::Fake(&[("FAKE_CUDA_DEVICES", "3"), ("FAKE_CUDA_CAPABILITY", "80,90,90")]),
        first_usable,
    ),
    (
        "a_variable_chooses_the_gpu",
        Library::Fake(&[
            ("FAKE_CUDA_DEVICES", "3"),
            ("FAKE_CUDA_CAPABILITY", "80,90,90"),
            (DEVICE_VARIABLE, "0"),
        ]),
        wrong_device::<8, 0>,
    ),
    ("without_nccl_the_error_says_what_to_install", TWO_GPUS, no_nccl),
    ("an_nccl_without_bf16_is_too_old", Library::FakeWithNccl(&[("FAKE_NCCL_VERSION", "2804")]), old_nccl),
    ("ranks_on_one_thread_reduce_in_groups", Library::FakeWithNccl(&[]), grouped_ranks),
    ("a_rank_alone_reduces_without_a_group", Library::FakeWithNccl(&[]), single_rank),
    ("communicators_are_destroyed_once_and_borrowed_ones_not", Library::FakeWithNccl(&[]), communicators),
    (
        "a_failing_reduction_has_the_message_of_nccl",
        Library::FakeWithNccl(&[("FAKE_NCCL_REDUCE", "6")]),
        failing_reduction,
    ),
    ("a_variable_that_is_no_number_is_an_error", Library::Fake(&[(DEVICE_VARIABLE, "gpu1")]), bad_device),
];

/// A fake driver whose launches succeed.
const WORKING: Library = Library::Fake(&[("FAKE_CUDA_LAUNCH", "0")]);
/// A fake driver with two GPUs whose launches succeed.
const TWO_GPUS: Library = Library::Fake(&[("FAKE_CUDA_LAUNCH", "0"), ("FAKE_CUDA_DEVICES", "2")]);

/// The environment variable that names the check for a child process to run.
const CHILD: &str = "LIQUIDGEMM_TEST_DRIVER_CHECK";

fn main() -> ExitCode {
    if let Ok(name) = std::env::var(CHILD) {
        return run_check(&name);
    }
    let arguments = Arguments::from_args();
    // The fake driver is compiled with rustc,
    // which may be missing where only the test binaries were copied to.
    let ignored = !cfg!(target_os = "linux") || Command::new(rustc()).arg("--version").output().is_err();
    let trials = CHECKS.map(|(name, library, _)| {
        Trial::test(name, move || run_child(name, library)).with_ignored_flag(ignored)
    });
    libtest_mimic::run(&arguments, trials.into()).exit_code()
}

/// Runs one check, in the child process.
fn run_check(name: &str) -> ExitCode {
    let Some((_, _, check)) = CHECKS.iter().find(|check| check.0 == name) else {
        eprintln!("no check is called {name}");
        return ExitCode::FAILURE;
    };
    match check() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failed) => {
            eprintln!("{}", failed.message().unwrap_or("failed"));
            ExitCode::FAILURE
        }
    }
}

/// Runs a check in a child process that finds `library` as its driver.
fn run_child(name: &str, library: Library) -> Result<(), Failed> {
    let mut command = Command::new(std::env::current_exe()?);
    command.env(CHILD, name);
    if let Some(folder) = folder_of(library) {
        let mut folders = vec![folder];
        folders.extend(std::env::var_os("LD_LIBRARY_PATH").iter().flat_map(std::env::split_paths));
        command.env("LD_LIBRARY_PATH", std::env::join_paths(folders)?);
    }
    command.env_remove(NCCL_VARIABLE);
    if let Library::Fake(environment) = library {
        command.envs(environment.iter().copied());
    }
    if let Library::FakeWithNccl(environment) = library {
        command.envs([("FAKE_CUDA_LAUNCH", "0"), ("FAKE_CUDA_DEVICES", "2")]);
        command.env(NCCL_VARIABLE, DRIVERS.join("nccl")).envs(environment.iter().copied());
    }
    let output = command.output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr)).into())
}

/// The folder with a folder for each fake library.
static DRIVERS: LazyLock<PathBuf> = LazyLock::new(|| {
    // Cargo reserves this folder for files of integration tests.
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("drivers");
    let of = |name: &str, library: &str| {
        let folder = folder.join(name);
        std::fs::create_dir_all(&folder).expect("the target folder takes files");
        folder.join(library)
    };
    let driver = |name| of(name, cuda_driver::LIBRARY);
    std::fs::write(driver("broken"), "no library").expect("the target folder takes files");
    compile_fake("libcuda.rs", &driver("fake"), &[]);
    compile_fake("libcuda.rs", &driver("without-launch"), &["--cfg", "without_launch_kernel_ex"]);
    compile_fake("libnccl.rs", &of("nccl", "libnccl.so.2"), &[]);
    folder
});

/// Returns a folder whose `libcuda.so.1` is this library, or `None` for the machine's own.
fn folder_of(library: Library) -> Option<PathBuf> {
    let name = match library {
        Library::TheMachines => return None,
        Library::Broken => "broken",
        Library::Fake(_) | Library::FakeWithNccl(_) => "fake",
        Library::FakeWithoutLaunch => "without-launch",
    };
    Some(DRIVERS.join(name))
}

fn rustc() -> std::ffi::OsString {
    std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into())
}

fn compile_fake(source: &str, library: &Path, arguments: &[&str]) {
    let output = Command::new(rustc())
        .args(["--edition=2024", "--crate-type=cdylib", "--crate-name=fake", "-o"])
        .arg(library)
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("fake").join(source))
        .args(["--check-cfg", "cfg(without_launch_kernel_ex)"])
        .args(arguments)
        .output()
        .expect("rustc starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Returns the error of `Gpu::new` and checks that both backend constructors agree with it.
///
/// `Backend::gpu` must return the same error.
/// `Backend::auto` must take the CPU, give the reason on one line, and multiply correctly.
fn unusable() -> Result<GpuError, Failed> {
    let Err(Error::Gpu(error)) = Gpu::new() else {
        return Err("Gpu::new gave no GPU error".into());
    };
    let text = error.to_string();
    match Backend::gpu() {
        Err(same) if same.to_string() == text => {}
        other => return Err(format!("Backend::gpu gave {other:?} instead of {text}").into()),
    }
    let backend = Backend::auto();
    let reason = backend.reason();
    let explains = reason.starts_with(&text.replace('\n', " ")) && reason.ends_with("using the CPU backend");
    if backend.as_gpu().is_some() || !explains || reason.contains('\n') {
        return Err(format!("Backend::auto gave {backend}, because {reason}").into());
    }
    let (m, n, k) = (3, 70, 130);
    let weights: Vec<f32> = (0..n * k).map(|i| (i as f32 * 0.37).sin()).collect();
    let weights = PackedWeights::quantize(&weights, n, k, Group::default())?;
    let x: Vec<f32> = (0..m * k).map(|i| (i as f32 * 0.11).cos()).collect();
    let x = QuantizedActivations::quantize(&x, m, k)?;
    let mut expected = vec![0f32; m * n];
    cpu::gemm(&weights, &x, None, &mut expected)?;
    check(backend.multiply::<f32>(&weights, &x, None)? == expected, "Backend::auto multiplies wrongly")?;
    Ok(error)
}

fn check(holds: bool, otherwise: impl Into<String>) -> Result<(), Failed> {
    if holds { Ok(()) } else { Err(otherwise.into().into()) }
}

fn no_driver() -> Result<(), Failed> {
    if cuda_driver::load().is_ok() {
        // This machine has a driver, so its absence cannot be tested here.
        return Ok(());
    }
    let error = unusable()?;
    let is_expected = matches!(error, GpuError::NoDriver(cuda_driver::LoadError::NotFound { .. }));
    check(is_expected && error.to_string().contains("install"), format!("{error:?}"))
}

fn broken_driver() -> Result<(), Failed> {
    let error = unusable()?;
    let is_expected = matches!(error, GpuError::NoDriver(cuda_driver::LoadError::NotADriver { .. }));
    check(is_expected && error.to_string().contains(cuda_driver::LIBRARY), format!("{error:?}"))
}

fn driver_too_old() -> Result<(), Failed> {
    let error = unusable()?;
    let GpuError::DriverTooOld { found, needed } = &error else { return Err(format!("{error:?}").into()) };
    check(
        (found.major, found.minor) == (11, 8) && (needed.major, needed.minor) == (12, 1),
        error.to_string(),
    )?;
    check(error.to_string().contains("update the driver"), error.to_string())
}

fn driver_just_new() -> Result<(), Failed> {
    let gpu = Gpu::new()?;
    check(gpu.description() == "Fake GPU, 132 SMs, driver for CUDA 12.1", gpu.description())
}

fn no_device() -> Result<(), Failed> {
    let error = unusable()?;
    check(matches!(error, GpuError::NoDevice), format!("{error:?}"))
}

fn driver_fails() -> Result<(), Failed> {
    let error = unusable()?;
    check(matches!(error, GpuError::Cuda { .. }), format!("{error:?}"))?;
    check(
        error.to_string() == "starting the NVIDIA driver failed: another status (CUDA status 999)",
        error.to_string(),
    )
}

fn wrong_device<const MAJOR: i32, const MINOR: i32>() -> Result<(), Failed> {
    let error = unusable()?;
    let is_expected = matches!(
        &error,
        GpuError::WrongDevice { name, major, minor } if name == "Fake GPU" && (*major, *minor) == (MAJOR, MINOR)
    );
    check(is_expected && error.to_string().contains("Hopper"), format!("{error:?}"))
}

fn missing_function() -> Result<(), Failed> {
    let error = unusable()?;
    let is_expected = matches!(error, GpuError::MissingFunction { name: "cuLaunchKernelEx" });
    check(is_expected, format!("{error:?}"))
}

fn no_such_device() -> Result<(), Failed> {
    Gpu::with_device(1)?;
    for ordinal in [2, u32::MAX] {
        match Gpu::with_device(ordinal) {
            Err(Error::Gpu(GpuError::NoSuchDevice { ordinal: named, count: 2 })) if named == ordinal => {}
            other => return Err(format!("{other:?}").into()),
        }
    }
    Ok(())
}

fn no_context() -> Result<(), Failed> {
    match Gpu::from_current_context() {
        Err(Error::Gpu(GpuError::NoContext)) => {}
        other => return Err(format!("{other:?}").into()),
    }
    let own = Gpu::new()?;
    own.make_current()?;
    let current = Gpu::from_current_context()?;
    check(own.description() == current.description(), current.description())
}

fn prepared() -> Result<(), Failed> {
    let gpu = Gpu::new()?;
    let loads = Fake::load()?.module_loads;
    // The small K keeps this quick. These token counts get skinny plans and tiled ones.
    let (n, k) = (22_016, 64);
    let tokens = || (1..=70).chain(1000..=1003);
    gpu.prepare(&[[n, k]], 1..=70)?;
    gpu.prepare(&[[n, k]], 1000..=1003)?;
    let after = loads();
    check(after > 3, format!("{after} kernels were loaded"))?;
    let weights = gpu.upload(&PackedWeights::quantize(&vec![1f32; n * k], n, k, Group::default())?)?;
    let workspace = gpu.workspace()?;
    for m in tokens() {
        // SAFETY: the fake driver launches nothing and dereferences no address.
        let outcome = unsafe { gpu.gemm(&weights, &fake_operands([m, n, k]), &workspace, default_stream()) };
        let text = outcome.as_ref().err().map(ToString::to_string).unwrap_or_default();
        check(text.starts_with("launching the GEMM failed"), format!("{m}: {outcome:?}"))?;
    }
    check(loads() == after, format!("{} kernels were loaded after they had been prepared", loads() - after))?;
    let empty = gpu.prepare(&[[0, k]], 1..=1);
    check(matches!(empty, Err(Error::EmptyDimension { dimension: "n" })), format!("{empty:?}"))
}

fn bad_calls() -> Result<(), Failed> {
    let [m, n, k] = REFUSED_SHAPE;
    let gpu = Gpu::new()?;
    let weights = PackedWeights::quantize(&vec![1f32; n * k], n, k, Group::default())?;
    let weights = gpu.upload(&weights)?;
    let workspace = gpu.workspace()?;
    // SAFETY: the fake driver dereferences no address.
    let bias = unsafe { DeviceSpan::from_raw(FAKE_ADDRESS, n * 4) };
    let good = Operands { bias: Some(bias), ..fake_operands([m, n, k]) };
    // SAFETY: the fake driver launches nothing and dereferences no address.
    let launch = |operands: &Operands, plan: &Plan| unsafe {
        gpu.gemm_with_plan(&weights, operands, plan, &workspace, default_stream())
    };
    for call in refused_calls(good)? {
        let outcome = launch(&call.operands, &call.plan);
        let as_expected = outcome
            .as_ref()
            .is_err_and(|error| (call.is_expected)(error) && error.to_string().contains(call.says));
        check(as_expected, format!("{}: {outcome:?}", call.wrong))?;
    }
    // The good call reaches the launch, where the fake driver returns a status that `cust` does not know.
    let outcome = launch(&good, &gpu.plan(Problem { m, n, k })?);
    let text = outcome.as_ref().err().map(ToString::to_string);
    check(
        text.as_deref() == Some("launching the GEMM failed: invalid cluster size (CUDA status 912)"),
        format!("{outcome:?}"),
    )
}

/// The fake driver's control functions, which no real driver has.
struct Fake {
    fail_after: extern "C" fn(i64),
    failure_pending: extern "C" fn() -> i32,
    allocations: extern "C" fn() -> u32,
    module_loads: extern "C" fn() -> u32,
    violations: extern "C" fn() -> u32,
    take_busy: extern "C" fn() -> i32,
    take_could_not_enter: extern "C" fn() -> i32,
    retained: extern "C" fn(i32) -> i64,
}

impl Fake {
    fn load() -> Result<Self, Failed> {
        let driver = cuda_driver::load()?;
        // SAFETY: these are the types of the fake's functions, which only set and read counters.
        unsafe {
            Ok(Self {
                fail_after: driver.symbol("fakeFailAfter").ok_or("fakeFailAfter")?,
                failure_pending: driver.symbol("fakeFailurePending").ok_or("fakeFailurePending")?,
                allocations: driver.symbol("fakeAllocations").ok_or("fakeAllocations")?,
                module_loads: driver.symbol("fakeModuleLoads").ok_or("fakeModuleLoads")?,
                violations: driver.symbol("fakeViolations").ok_or("fakeViolations")?,
                take_busy: driver.symbol("fakeTakeBusy").ok_or("fakeTakeBusy")?,
                take_could_not_enter: driver
                    .symbol("fakeTakeCouldNotEnter")
                    .ok_or("fakeTakeCouldNotEnter")?,
                retained: driver.symbol("fakeRetained").ok_or("fakeRetained")?,
            })
        }
    }

    /// Lets `calls` driver calls pass and makes the next one fail.
    /// Cancels the failure if `calls` is negative.
    fn fail_after(&self, calls: i64) {
        (self.fail_after)(calls)
    }

    fn failure_is_pending(&self) -> bool {
        (self.failure_pending)() != 0
    }

    fn allocations(&self) -> u32 {
        (self.allocations)()
    }

    fn violations(&self) -> u32 {
        (self.violations)()
    }

    fn take_busy(&self) -> bool {
        (self.take_busy)() != 0
    }

    fn take_could_not_enter(&self) -> bool {
        (self.take_could_not_enter)() != 0
    }

    fn retained(&self, device: i32) -> i64 {
        (self.retained)(device)
    }
}

/// The address of all operands for the fake driver.
const FAKE_ADDRESS: u64 = 1 << 20;

/// Operands with bf16 output and without bias for the fake driver, which dereferences no address.
fn fake_operands([m, n, k]: [usize; 3]) -> Operands {
    let stride = k.next_multiple_of(16);
    // SAFETY: the fake driver neither reads nor writes there.
    let span = |bytes| unsafe { DeviceSpan::from_raw(FAKE_ADDRESS, bytes) };
    Operands {
        m,
        activations: span(m * stride),
        activation_stride: stride,
        token_scales: span(m * 4),
        bias: None,
        output: span(m * n * 2),
        output_stride: n,
        output_type: OutputType::Bf16,
    }
}

/// The default stream.
fn default_stream() -> StreamHandle {
    // SAFETY: null is always a valid stream.
    unsafe { StreamHandle::from_raw(std::ptr::null_mut()) }
}

fn some_weights() -> Result<PackedWeights, Error> {
    PackedWeights::quantize(&vec![1f32; 200 * 300], 200, 300, Group::default())
}

fn some_activations(m: usize) -> Result<QuantizedActivations, Error> {
    QuantizedActivations::quantize(&vec![1f32; m * 300], m, 300)
}

/// Returns the address of the context that is current on this thread, or 0 if none is.
fn current() -> Result<usize, Failed> {
    let mut context = std::ptr::null_mut();
    // SAFETY: the pointer is valid for a write.
    let status = unsafe { cust::sys::cuCtxGetCurrent(&mut context) };
    check(status as u32 == 0, format!("{status:?}"))?;
    Ok(context as usize)
}

fn freed_anywhere() -> Result<(), Failed> {
    let gpu = Gpu::new()?;
    let fake = Fake::load()?;
    let (weights, workspace) = (gpu.upload(&some_weights()?)?, gpu.workspace()?);
    let allocations = fake.allocations();
    check(allocations >= 4, format!("{allocations} allocations"))?;
    drop(gpu);
    check(fake.retained(0) > 0, "the context was released before its allocations")?;
    // A new Gpu gets the same primary context.
    let again = Gpu::new()?;
    let downloaded = std::thread::spawn(move || {
        // This thread has no current context.
        let downloaded = weights.download();
        drop((weights, workspace));
        downloaded.map(|_| ())
    });
    match downloaded.join() {
        // The fake driver copies zeros back, which are not valid pairs.
        Ok(Err(Error::InvariantBroken { .. })) => {}
        other => return Err(format!("{other:?}").into()),
    }
    check(fake.allocations() == 0, format!("{} allocations stay", fake.allocations()))?;
    drop(again);
    check(fake.retained(0) == 0, format!("the context is retained {} times", fake.retained(0)))?;
    check(fake.violations() == 0, format!("{} violations", fake.violations()))
}

fn current_context() -> Result<(), Failed> {
    let (gpu, other) = (Gpu::with_device(0)?, Gpu::with_device(1)?);
    check(current()? == 0, "a new Gpu leaves its context current")?;
    let use_all = || -> Result<(), Failed> {
        let weights = gpu.upload(&some_weights()?)?;
        gpu.workspace()?;
        gpu.prepare(&[[200, 300]], 1..=2)?;
        gpu.multiply::<f32>(&some_weights()?, &some_activations(3)?, None)?;
        gpu.multiply_with::<f32>(&weights, &some_activations(3)?, None)?;
        let _ = weights.download();
        drop(Gpu::with_device(0)?);
        Ok(())
    };
    use_all()?;
    check(current()? == 0, "a call leaves a context current")?;
    other.make_current()?;
    let before = current()?;
    use_all()?;
    check(current()? == before, "a call leaves another context current")?;
    drop(other);
    check(current()? == 0, "a dead context is current")
}

fn other_gpu() -> Result<(), Failed> {
    let (gpu, other) = (Gpu::with_device(0)?, Gpu::with_device(1)?);
    let weights = other.upload(&some_weights()?)?;
    let outcome = gpu.multiply_with::<f32>(&weights, &some_activations(3)?, None);
    check(
        matches!(outcome, Err(Error::Gpu(GpuError::OtherContext { what: "weights" }))),
        format!("{outcome:?}"),
    )?;
    check(other.multiply_with::<f32>(&weights, &some_activations(3)?, None).is_ok(), "its own")
}

fn no_tokens() -> Result<(), Failed> {
    let gpu = Gpu::new()?;
    let (weights, workspace) = (gpu.upload(&some_weights()?)?, gpu.workspace()?);
    let none = some_activations(0)?;
    let product = gpu.multiply_with::<f32>(&weights, &none, None)?;
    check(product.is_empty(), format!("{} elements", product.len()))?;
    check(gpu.multiply::<f32>(&some_weights()?, &none, None)?.is_empty(), "elements")?;
    // SAFETY: the fake driver launches nothing and dereferences no address.
    let outcome = unsafe {
        let nothing = DeviceSpan::from_raw(0, 0);
        let operands = Operands {
            activations: nothing,
            token_scales: nothing,
            output: nothing,
            ..fake_operands([0, 200, 300])
        };
        gpu.gemm(&weights, &operands, &workspace, default_stream())
    };
    outcome?;
    check(!Fake::load()?.take_busy(), "something was launched")
}

fn first_usable() -> Result<(), Failed> {
    let gpu = Gpu::new()?;
    let fake = Fake::load()?;
    check([0, 1, 2].map(|device| fake.retained(device)) == [0, 1, 0], "the contexts are not those of GPU 1")?;
    drop(gpu);
    check(Backend::auto().as_gpu().is_some(), "the CPU was taken")
}

fn bad_device() -> Result<(), Failed> {
    match unusable()? {
        GpuError::BadDevice { text } if text == "gpu1" => Ok(()),
        other => Err(format!("{other:?}").into()),
    }
}

/// Runs a GEMM with a two-launch plan, whose second launch can fail alone, and waits for the stream.
///
/// Leaks the weights and the workspace if the wait fails, because a launch may still use them.
fn two_launches() -> Result<(), Error> {
    let gpu = Gpu::new()?;
    let (m, n, k) = (5, 200, 300);
    let (weights, workspace) = (gpu.upload(&some_weights()?)?, gpu.workspace()?);
    let configs = [TileConfig { shape: TILE_SHAPES[0], cluster_size: 1, clusters: 4, stream_k_waves: 0 }; 2];
    let plan = Plan::two_launches(Problem { m, n, k }, 128, configs)?;
    let (operands, stream) = (fake_operands([m, n, k]), default_stream());
    // SAFETY: the fake driver dereferences no address.
    let (launched, finished) = unsafe {
        let launched = gpu.gemm_with_plan(&weights, &operands, &plan, &workspace, stream);
        let entered = gpu.make_current();
        (launched, entered.is_ok() && cust::sys::cuStreamSynchronize(stream.as_raw().cast()) as u32 == 0)
    };
    if !finished {
        std::mem::forget((weights, workspace));
    }
    launched
}

/// Runs a grouped GEMM and a combine of its rows, and waits for the stream.
///
/// Leaks the experts if the wait fails, because a launch may still use them.
fn grouped() -> Result<(), Error> {
    let gpu = Gpu::new()?;
    let (rows, n, k) = (6, 200, 300);
    let experts = gpu.upload_experts(&[some_weights()?, some_weights()?])?;
    let (dense, stream) = (fake_operands([rows, n, k]), default_stream());
    // SAFETY: the fake driver neither reads nor writes there.
    let span = |bytes| unsafe { DeviceSpan::from_raw(FAKE_ADDRESS, bytes) };
    let operands = GroupedOperands {
        rows,
        index: DeviceRowIndex::Offsets(span(3 * 4)),
        expected_rows: None,
        activations: dense.activations,
        activation_stride: dense.activation_stride,
        token_scales: dense.token_scales,
        bias: None,
        output: dense.output,
        output_stride: n,
        output_type: OutputType::Bf16,
        status: None,
    };
    let combine = CombineOperands {
        tokens: 3,
        top_k: 2,
        row_count: rows,
        n,
        element_type: OutputType::Bf16,
        rows: dense.output,
        rows_stride: n,
        positions: span(rows * 4),
        weights: span(rows * 4),
        output: span(3 * n * 2),
        output_stride: n,
    };
    // SAFETY: the fake driver dereferences no address.
    let (launched, finished) = unsafe {
        let launched =
            gpu.grouped_gemm(&experts, &operands, stream).and_then(|()| gpu.combine(&combine, stream));
        let entered = gpu.make_current();
        (launched, entered.is_ok() && cust::sys::cuStreamSynchronize(stream.as_raw().cast()) as u32 == 0)
    };
    if !finished {
        std::mem::forget(experts);
    }
    launched
}

/// Runs a linear layer and waits for the stream.
///
/// Leaks the layer and the workspace if the wait fails, because a launch may still use them.
fn linear() -> Result<(), Error> {
    let gpu = Gpu::new()?;
    let (m, n, k) = (300, 200, 300);
    let layer = Linear::new(some_weights()?).with_bias(vec![1.0; n])?.with_smoothing(vec![2.0; k])?;
    let (layer, workspace) = (gpu.upload_linear(&layer)?, gpu.workspace()?);
    let stream = default_stream();
    // SAFETY: the fake driver neither reads nor writes there.
    let span = |bytes| unsafe { DeviceSpan::from_raw(FAKE_ADDRESS, bytes) };
    let input = LinearInput::new(span(m * k * 2), HalfType::Bf16, m, k);
    let output = LinearOutput { output: span(m * n * 2), output_stride: n, output_type: OutputType::Bf16 };
    let scratch = span(layer.scratch_bytes(m)?);
    // SAFETY: the fake driver dereferences no address.
    let (launched, finished) = unsafe {
        let launched = layer.forward(&gpu, &input, &output, scratch, &workspace, stream);
        let entered = gpu.make_current();
        (launched, entered.is_ok() && cust::sys::cuStreamSynchronize(stream.as_raw().cast()) as u32 == 0)
    };
    if !finished {
        std::mem::forget((layer, workspace));
    }
    launched
}

/// The only rank: its reductions change nothing.
struct Alone;

impl AllReduce for Alone {
    fn rank(&self) -> usize {
        0
    }

    unsafe fn all_reduce(&self, _: Reduction, _: DeviceSpan, _: StreamHandle) -> Result<(), Error> {
        Ok(())
    }

    fn begin_group(&self) -> Result<(), Error> {
        Ok(())
    }

    fn end_group(&self) -> Result<(), Error> {
        Ok(())
    }
}

/// Uploads a rank's shard and runs a call of all these ranks on one thread, then waits for the stream of each.
///
/// Leaks the layers and workspaces if a wait fails, because a launch may still use them.
fn call_ranks<C: AllReduce>(gpus: &[&Gpu], world: &[C], partials: Partials) -> Result<(), Error> {
    let (m, n, k) = (30, 200, 300);
    // SAFETY: the fake driver neither reads nor writes there.
    let span = |bytes| unsafe { DeviceSpan::from_raw(FAKE_ADDRESS, bytes) };
    let layer = Linear::new(some_weights()?).with_bias(vec![1.0; n])?;
    let mut ranks = Vec::new();
    for gpu in gpus {
        let layer = RowParallelLinear::new(gpu.upload_linear(&layer)?).with_partials(partials);
        ranks.push((layer, gpu.workspace()?));
    }
    let calls: Vec<_> = gpus
        .iter()
        .zip(&ranks)
        .zip(world)
        .map(|((gpu, (layer, workspace)), communicator)| {
            Ok(RowParallelCall {
                gpu,
                layer,
                communicator,
                input: LinearInput::new(span(m * k * 2), HalfType::Bf16, m, k),
                // The rows have gaps, so rounded sums are copied.
                output: LinearOutput {
                    output: span(m * (n + 8) * 2),
                    output_stride: n + 8,
                    output_type: OutputType::Bf16,
                },
                scratch: span(layer.scratch_bytes(m)?),
                workspace,
                stream: default_stream(),
            })
        })
        .collect::<Result<_, Error>>()?;
    // SAFETY: the fake driver dereferences no address.
    let launched = unsafe { RowParallelCall::forward_all(&calls) };
    let finished = gpus.iter().all(|gpu| {
        let entered = gpu.make_current().is_ok();
        // SAFETY: the stream is the context's default one.
        entered && unsafe { cust::sys::cuStreamSynchronize(default_stream().as_raw().cast()) } as u32 == 0
    });
    drop(calls);
    if !finished {
        std::mem::forget(ranks);
    }
    launched
}

fn row_parallel(partials: Partials) -> Result<(), Error> {
    call_ranks(&[&Gpu::new()?], &[Alone], partials)
}

/// The fake NCCL's counters, which no real one has.
struct FakeNccl {
    alive: extern "C" fn() -> i64,
    reductions: extern "C" fn() -> i64,
    take_kinds: extern "C" fn() -> i64,
}

impl FakeNccl {
    fn load() -> Result<Self, Failed> {
        let folder = std::env::var_os(NCCL_VARIABLE).ok_or("the variable is set for this check")?;
        // SAFETY: the library is the fake, which the process has loaded or is about to load,
        // and these are the types of its functions, which only read counters.
        unsafe {
            let library = libloading::Library::new(Path::new(&folder).join("libnccl.so.2"))?;
            let this = Self {
                alive: *library.get("fakeNcclAlive")?,
                reductions: *library.get("fakeNcclReductions")?,
                take_kinds: *library.get("fakeNcclTakeKinds")?,
            };
            // The functions stay valid.
            std::mem::forget(library);
            Ok(this)
        }
    }
}

fn no_nccl() -> Result<(), Failed> {
    if nccl_version().is_ok() {
        // This machine has an NCCL, so its absence cannot be tested here.
        return Ok(());
    }
    let error = Communicator::of_process(&[&Gpu::new()?]).err().ok_or("communicators without NCCL")?;
    let text = error.to_string();
    check(matches!(error, Error::Gpu(GpuError::NcclNotFound { .. })), format!("{error:?}"))?;
    for part in ["libnccl.so.2", "nvidia-nccl-cu12", "nvidia-nccl-cu13", "LD_LIBRARY_PATH", NCCL_VARIABLE] {
        check(text.contains(part), format!("{part} is not in {text}"))?;
    }
    check(UniqueId::new().is_err() && nccl_version().is_err(), "an id without NCCL")
}

fn old_nccl() -> Result<(), Failed> {
    let error = nccl_version().err().ok_or("an old NCCL was taken")?;
    check(error.to_string().contains("is NCCL 2.8.4, but 2.10.0 is needed"), error.to_string())
}

fn grouped_ranks() -> Result<(), Failed> {
    check(nccl_version()? == "2.27.5", nccl_version()?)?;
    let (first, second) = (Gpu::with_device(0)?, Gpu::with_device(1)?);
    let gpus = [&first, &second];
    let world = Communicator::of_process(&gpus)?;
    check(
        world.iter().map(|handle| (handle.rank(), handle.world_size())).eq([(0, 2), (1, 2)]),
        format!("{world:?}"),
    )?;
    let fake = FakeNccl::load()?;
    // The fake refuses reductions outside of a group.
    call_ranks(&gpus, &world, Partials::Int32)?;
    // int32 is type 2, bf16 9; the sum is operation 0, the maximum 2.
    check((fake.take_kinds)() == 22_222_020, "not the maximum of int32, then the sum, of each rank")?;
    call_ranks(&gpus, &world, Partials::Rounded)?;
    check((fake.take_kinds)() == 9090, "not the sum of bf16 of each rank")?;
    check((fake.reductions)() == 6, format!("{} reductions", (fake.reductions)()))?;
    check(Fake::load()?.violations() == 0, "violations")
}

fn single_rank() -> Result<(), Failed> {
    let gpu = Gpu::new()?;
    let id = UniqueId::from_bytes(UniqueId::new()?.to_bytes());
    let communicator = Communicator::new(&gpu, id, 1, 2)?;
    check(current()? == 0, "a context stays current")?;
    call_ranks(&[&gpu], &[communicator], Partials::Int32)?;
    check((FakeNccl::load()?.take_kinds)() == 2220, "not two reductions")?;
    let outside = Communicator::new(&gpu, id, 2, 2);
    let is_expected =
        matches!(outside, Err(Error::Gpu(GpuError::OutOfRange { what: "the rank", value: 2, limit: 1 })));
    check(is_expected, format!("{outside:?}"))
}

fn communicators() -> Result<(), Failed> {
    let (first, second) = (Gpu::with_device(0)?, Gpu::with_device(1)?);
    let fake = FakeNccl::load()?;
    check(Communicator::of_process(&[])?.is_empty(), "communicators of no GPU")?;
    let mut world = Communicator::of_process(&[&first, &second])?;
    check((fake.alive)() == 2, format!("{} are alive", (fake.alive)()))?;
    // SAFETY: the owner outlives the borrowed communicator.
    let borrowed = unsafe { Communicator::from_raw(world[1].as_raw()) }?;
    check((borrowed.rank(), borrowed.world_size()) == (1, 2), format!("{borrowed:?}"))?;
    borrowed.check()?;
    drop(borrowed);
    check((fake.alive)() == 2, "a borrowed communicator was destroyed")?;
    world.pop().ok_or("two ranks")?.abort()?;
    check((fake.alive)() == 1, "an aborted communicator was destroyed as well, or not ended")?;
    drop(world);
    check((fake.alive)() == 0, format!("{} stay", (fake.alive)()))
}

fn failing_reduction() -> Result<(), Failed> {
    let (first, second) = (Gpu::with_device(0)?, Gpu::with_device(1)?);
    let gpus = [&first, &second];
    let world = Communicator::of_process(&gpus)?;
    let expected = "an all-reduce failed: remote process exited: the fake's detail (NCCL status 6)";
    for partials in [Partials::Int32, Partials::Rounded] {
        let error = call_ranks(&gpus, &world, partials).err().ok_or("the reduction succeeded")?;
        check(error.to_string() == expected, error.to_string())?;
    }
    let error = world[0].check().err().ok_or("the reduction has not failed")?;
    check(error.to_string().starts_with("a reduction failed: remote"), error.to_string())?;
    // Each failed call has ended its group, so there is none to end.
    let ended = world[0].end_group();
    check(ended.is_err(), "a group stays open")?;
    check(Fake::load()?.violations() == 0, "violations")
}

/// Makes weights and a workspace in memory that the caller owns, which the library never frees.
fn borrowed_memory() -> Result<(), Error> {
    let gpu = Gpu::new()?;
    let packed = some_weights()?;
    let bytes = DeviceWeights::bytes_for(packed.n(), packed.k(), packed.group())?;
    // SAFETY: the fake driver neither reads nor writes there.
    unsafe {
        gpu.upload_to(&packed, DeviceSpan::from_raw(FAKE_ADDRESS, bytes))?;
        gpu.workspace_in(DeviceSpan::from_raw(FAKE_ADDRESS, gpu.workspace_bytes()))?;
    }
    Ok(())
}

/// Uploads weights and downloads them.
///
/// The fake driver keeps no contents, so what comes back is no valid packed weights: only the driver's errors count.
fn download() -> Result<(), Error> {
    match Gpu::new()?.upload(&some_weights()?)?.download() {
        Err(error @ Error::Gpu(_)) => Err(error),
        _ => Ok(()),
    }
}

/// Loads a kernel of another crate, launches it and waits, as the probes and the ablation do.
fn custom_kernel() -> Result<(), Error> {
    let gpu = Gpu::new()?;
    let kernel = gpu.load_kernel("// no text", "kernel", 32, 0)?;
    let stream = default_stream();
    // SAFETY: the fake driver runs nothing.
    let launched = unsafe { gpu.launch_kernel(&kernel, 1, &mut [], stream) };
    gpu.make_current()?;
    // SAFETY: the stream is the context's default one.
    unsafe { cust::sys::cuStreamSynchronize(stream.as_raw().cast()) };
    launched
}

/// Fails each driver call of each public operation in turn.
///
/// The operation must return an error or succeed, free nothing that may still be in use, leak nothing,
/// and work afterwards.
fn any_failure() -> Result<(), Failed> {
    let (packed, x) = (some_weights()?, some_activations(3)?);
    type Operation<'a> = &'a dyn Fn() -> Result<(), Error>;
    let operations: [(&str, Operation<'_>); 16] = [
        ("Gpu::new", &|| Gpu::new().map(drop)),
        ("Gpu::upload", &|| Gpu::new()?.upload(&packed).map(drop)),
        ("Gpu::workspace", &|| Gpu::new()?.workspace().map(drop)),
        ("Gpu::prepare", &|| Gpu::new()?.prepare(&[[200, 300]], 1..=40)),
        ("Gpu::multiply", &|| Gpu::new()?.multiply::<f32>(&packed, &x, None).map(drop)),
        ("Gpu::gemm_with_plan in two launches", &two_launches),
        ("Gpu::upload_experts", &|| {
            Gpu::new()?.upload_experts(&[some_weights()?, some_weights()?]).map(drop)
        }),
        ("Gpu::prepare_grouped", &|| Gpu::new()?.prepare_grouped()),
        ("Gpu::grouped_gemm and Gpu::combine", &grouped),
        ("Gpu::prepare_quantize", &|| {
            Gpu::new()?.prepare_quantize(&liquidgemm::Operation::Plain, HalfType::F16, 300)
        }),
        ("DeviceLinear::forward", &linear),
        ("RowParallelCall::forward_all", &|| row_parallel(Partials::Int32)),
        ("RowParallelCall::forward_all, rounded", &|| row_parallel(Partials::Rounded)),
        ("Gpu::upload_to and Gpu::workspace_in", &borrowed_memory),
        ("DeviceWeights::download", &download),
        ("Gpu::launch_kernel", &custom_kernel),
    ];
    Gpu::new()?;
    let fake = Fake::load()?;
    for (name, operation) in operations {
        operation()?;
        for call in 0.. {
            let before = fake.allocations();
            fake.fail_after(call);
            let outcome = operation();
            let is_over = fake.failure_is_pending();
            fake.fail_after(-1);
            let busy = fake.take_busy();
            let what = || format!("{name}, call {call} fails: {outcome:?}");
            check(fake.violations() == 0, format!("{}: an invalid free", what()))?;
            // Two kinds of allocations must stay: those that a launch may still use,
            // and those in a context that could not be made current.
            let stays = busy || fake.take_could_not_enter();
            check(
                stays || fake.allocations() <= before,
                format!("{}: {} allocations stay", what(), fake.allocations()),
            )?;
            check(operation().is_ok(), format!("{}: the next operation fails, too", what()))?;
            if is_over {
                check(outcome.is_ok() && call > 3, what())?;
                break;
            }
        }
    }
    Ok(())
}
