//! Torch's kernels, measured in the same run as ours, if torch is installed.
//!
//! A Python script of this folder measures them in a process of its own, with the interpreter that the user names.
//! It runs before the bench allocates memory on the GPU, so that each process has nearly the whole memory in turn.
//! Until then the bench holds only its context, which takes some hundred megabytes.
//! Both sides time in the same way: CUDA graphs, rotating operands, the same pace, medians.
//!
//! The script gets a request as a JSON file and answers with JSON lines on stdout; its stderr is progress.
//! A measurement that fails is recorded with the reason, and the others are not affected.
//! So is one that comes too late: a script stops measuring after a fixed time, because compilations take most of it.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use cust::sys;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::driver::During;
use super::replay::{self, Pace};
use super::statistics::Timing;
use liquidgemm::gpu::Gpu;

/// Lines of the script's stderr that an error quotes.
const QUOTED_LINES: usize = 12;
/// How long a script may take longer than it should, before it is ended.
const GRACE: Duration = Duration::from_secs(60);
/// How long to wait for another line of stderr after the script has ended.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// A script with the file name that Python knows it by.
#[derive(Clone, Copy, Debug)]
pub(super) struct Script {
    name: &'static str,
    text: &'static str,
    /// Seconds after which the remaining measurements are left out.
    budget_s: u32,
}

/// Torch's fp8 grouped GEMM.
pub(super) const MOE: Script = Script { name: "moe.py", text: include_str!("moe.py"), budget_s: 60 };
/// Quantization of activations by `torch.compile`.
pub(super) const ACTIVATIONS: Script =
    Script { name: "activations.py", text: include_str!("activations.py"), budget_s: 90 };
/// What both scripts import.
const REPLAY: Script = Script { name: "replay.py", text: include_str!("replay.py"), budget_s: 0 };

/// The torch that was measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Torch {
    /// Version of torch, such as `2.11.0+cu130`.
    pub version: String,
    /// Version of CUDA that torch was built with.
    pub cuda: String,
    /// Name of the GPU.
    pub device: String,
}

/// The outcome of one measurement.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Microseconds per launch. `None` if the measurement failed.
    pub timing: Option<Timing>,
    /// Why the measurement failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl Outcome {
    /// Whether there is either a possible time or a reason for there being none.
    pub(super) fn is_plausible(&self) -> bool {
        match &self.timing {
            Some(timing) => self.error.is_none() && timing.is_plausible(),
            None => self.error.is_some(),
        }
    }
}

/// The outcomes of all measurements that a script was asked for, in that order.
#[derive(Clone, Debug, PartialEq)]
pub struct Results {
    /// The torch that was measured.
    pub torch: Torch,
    /// The outcomes.
    pub outcomes: Vec<Outcome>,
}

/// What happens while a script runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress<'a> {
    /// A line that the script wrote about its progress.
    Line(&'a str),
    /// A measurement has ended.
    Measured,
}

/// A line of the script's stdout.
#[derive(Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
enum Answer {
    Torch(Torch),
    Result { job: usize, launches: usize, replays: Vec<f64> },
    Failure { job: usize, error: String },
}

/// A line of the script's output.
enum Line {
    /// A line of stdout, or its end.
    Out(Option<String>),
    Err(String),
}

/// Has a script measure jobs on the GPU that `gpu` is.
///
/// # Errors
/// If Python can't be run, the script fails before it has measured anything, or torch has another GPU.
/// The failure of one measurement is its outcome; so is a later failure of the script, for what it has not measured.
pub(super) fn measure(
    gpu: &Gpu,
    python: &Path,
    script: Script,
    pace: Pace,
    jobs: Vec<Value>,
    watch: &mut dyn FnMut(Progress<'_>),
) -> anyhow::Result<Results> {
    gpu.make_current()?;
    let mut device = 0;
    // SAFETY: the argument is valid for a write, and a context is current.
    unsafe { sys::cuCtxGetDevice(&mut device) }.during("asking for the GPU's number")?;
    let count = jobs.len();
    let request = json!({
        "device": device,
        "budget_s": script.budget_s,
        "clock": replay::rules(pace),
        "jobs": jobs,
    });
    let results = run(python.as_os_str(), script, &request, count, watch)
        .with_context(|| format!("measuring torch with {}", python.display()))?;
    let found = &results.torch.device;
    ensure!(
        found == gpu.name(),
        "torch measured {found:?}, not {:?}; make only one GPU visible with CUDA_VISIBLE_DEVICES",
        gpu.name()
    );
    Ok(results)
}

/// Runs a script on a request for `count` jobs.
fn run(
    python: &OsStr,
    script: Script,
    request: &Value,
    count: usize,
    watch: &mut dyn FnMut(Progress<'_>),
) -> anyhow::Result<Results> {
    let directory = tempfile::tempdir().context("making a directory for the script")?;
    let path = |name: &str| directory.path().join(name);
    for Script { name, text, .. } in [script, REPLAY] {
        std::fs::write(path(name), text).context("writing the script")?;
    }
    std::fs::write(path("request.json"), serde_json::to_vec(request)?).context("writing the request")?;
    let mut command = Command::new(python);
    command.arg(path(script.name)).arg(path("request.json")).env("PYTHONDONTWRITEBYTECODE", "1");
    let child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().with_context(
            || format!("cannot run {}; give --torch a Python that has torch", python.display()),
        )?;
    let mut child = Running(child);
    let (sender, lines) = mpsc::channel();
    forward(child.0.stdout.take(), sender.clone(), |line| Line::Out(Some(line)), Some(Line::Out(None)));
    forward(child.0.stderr.take(), sender, Line::Err, None);
    let mut answers = Answers { torch: None, outcomes: vec![None; count] };
    let mut last = VecDeque::new();
    let mut keep = |text: String| {
        last.push_back(text);
        if last.len() > QUOTED_LINES {
            last.pop_front();
        }
    };
    let end = Instant::now() + Duration::from_secs(script.budget_s.into()) + GRACE;
    let in_time = loop {
        match lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(Line::Out(Some(text))) => answers.add(&text, watch)?,
            Ok(Line::Err(text)) => {
                watch(Progress::Line(&text));
                keep(text);
            }
            Ok(Line::Out(None)) | Err(RecvTimeoutError::Disconnected) => break true,
            Err(RecvTimeoutError::Timeout) => break false,
        }
    };
    if !in_time {
        // It fails only if the script has just ended.
        let _ = child.0.kill();
    }
    let status = child.0.wait().context("waiting for the script")?;
    // Processes that the script has left behind may keep its stderr open, so don't wait for the end.
    while let Ok(Line::Err(text)) = lines.recv_timeout(LAST_WORDS) {
        watch(Progress::Line(&text));
        keep(text);
    }
    if status.success() {
        return answers.complete().with_context(|| format!("{} ended early", script.name));
    }
    let how = if in_time { status.to_string() } else { "it took too long and was ended".into() };
    let reason = format!("{} failed ({how})", script.name);
    // What was measured until then is still worth having.
    answers.with_failures(&reason).with_context(|| {
        let last = last.into_iter().collect::<Vec<_>>().join("\n  ");
        format!("{reason}; its last lines are:\n  {last}")
    })
}

/// Sends every line of a pipe, and then `end`, from a thread that ends when the pipe is closed.
fn forward(
    pipe: Option<impl Read + Send + 'static>,
    to: mpsc::Sender<Line>,
    kind: fn(String) -> Line,
    end: Option<Line>,
) {
    let lines = pipe.into_iter().flat_map(|pipe| BufReader::new(pipe).split(b'\n').map_while(Result::ok));
    let texts = lines.map(|line| String::from_utf8_lossy(&line).trim_end().to_owned());
    let all = texts.filter(|text| !text.is_empty()).map(kind).chain(end);
    std::thread::spawn(move || {
        // Sending fails once nobody listens.
        all.map(|line| to.send(line)).find(Result::is_err)
    });
}

/// A running script, which ends with this value.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only if the script has already ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What the script has answered so far.
struct Answers {
    torch: Option<Torch>,
    outcomes: Vec<Option<Outcome>>,
}

impl Answers {
    fn add(&mut self, line: &str, watch: &mut dyn FnMut(Progress<'_>)) -> anyhow::Result<()> {
        let answer = serde_json::from_str(line).with_context(|| format!("not understood: {line}"))?;
        let (job, outcome) = match answer {
            Answer::Torch(torch) => {
                self.torch = Some(torch);
                return Ok(());
            }
            Answer::Failure { job, error } => (job, Outcome { timing: None, error: Some(error) }),
            Answer::Result { job, launches, replays } => {
                let timing = Timing::new(replays, launches);
                ensure!(timing.is_some_and(|timing| timing.is_plausible()), "an impossible time: {line}");
                (job, Outcome { timing, error: None })
            }
        };
        let count = self.outcomes.len();
        let place = self.outcomes.get_mut(job).filter(|place| place.is_none());
        *place.with_context(|| format!("not one of {count} jobs, or a second answer to one: {line}"))? =
            Some(outcome);
        watch(Progress::Measured);
        Ok(())
    }

    /// Returns the results of a script that has failed, with `reason` in the place of those that are missing.
    /// `None` if nothing was measured.
    fn with_failures(self, reason: &str) -> Option<Results> {
        let torch = self.torch?;
        let missing = Outcome { timing: None, error: Some(reason.to_owned()) };
        let measured = self.outcomes.iter().flatten().any(|outcome| outcome.timing.is_some());
        let fill = |outcome: Option<Outcome>| outcome.unwrap_or_else(|| missing.clone());
        measured.then(|| Results { torch, outcomes: self.outcomes.into_iter().map(fill).collect() })
    }

    fn complete(self) -> anyhow::Result<Results> {
        let torch = self.torch.context("it did not say which torch it measured")?;
        let missing = self.outcomes.iter().filter(|outcome| outcome.is_none()).count();
        ensure!(missing == 0, "{missing} of {} measurements are missing", self.outcomes.len());
        Ok(Results { torch, outcomes: self.outcomes.into_iter().flatten().collect() })
    }
}

/// The footnotes of a page: one for each distinct reason.
#[derive(Default)]
pub(super) struct Footnotes(Vec<String>);

impl Footnotes {
    /// Returns the mark of a reason.
    pub(super) fn mark(&mut self, reason: &str) -> String {
        let known = self.0.iter().position(|known| known == reason);
        let index = known.unwrap_or_else(|| {
            self.0.push(reason.to_owned());
            self.0.len() - 1
        });
        format!("[^{}]", index + 1)
    }

    /// Returns the text of the footnotes, which is empty if there are none.
    pub(super) fn text(&self) -> String {
        let notes = self.0.iter().enumerate();
        notes.map(|(index, reason)| format!("\n[^{}]: torch: {reason}\n", index + 1)).collect()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Results of a made-up torch, each a number of microseconds or a failure.
    pub(crate) fn results(us: &[Result<f64, &str>]) -> Results {
        let outcome = |us: &Result<f64, &str>| match us {
            Ok(us) => Outcome { timing: Timing::new(vec![*us], 20), error: None },
            Err(error) => Outcome { timing: None, error: Some((*error).to_owned()) },
        };
        let torch = Torch { version: "2.11.0".into(), cuda: "13.0".into(), device: "a GPU".into() };
        Results { torch, outcomes: us.iter().map(outcome).collect() }
    }

    /// Runs a shell script in the place of Python.
    #[cfg(unix)]
    fn answer(shell: &str, count: usize) -> (anyhow::Result<Results>, Vec<String>) {
        let script = Script { name: "script.sh", text: Box::leak(shell.to_owned().into_boxed_str()), ..MOE };
        let mut seen = Vec::new();
        let results = run(OsStr::new("sh"), script, &json!({ "jobs": [1] }), count, &mut |progress| {
            seen.push(format!("{progress:?}"));
        });
        (results, seen)
    }

    #[cfg(unix)]
    const TORCH: &str =
        r#"echo '{"kind": "torch", "version": "2.11.0", "cuda": "13.0", "device": "a GPU"}';"#;

    #[cfg(unix)]
    #[test]
    fn answers_become_outcomes_in_the_order_of_the_jobs() {
        let shell = format!(
            r#"{TORCH} grep -q jobs "$1" || exit 3; echo working >&2
            echo '{{"kind": "failure", "job": 1, "error": "out of memory"}}'
            echo '{{"kind": "result", "job": 0, "launches": 7, "replays": [3.0, 1.0, 2.0]}}'"#
        );
        let (outcome, seen) = answer(&shell, 2);
        let found = outcome.unwrap();
        assert_eq!(found.torch, results(&[]).torch);
        let timing = found.outcomes[0].timing.unwrap();
        assert_eq!((timing.us, timing.launches, timing.replays), (2.0, 7, 3));
        assert_eq!(found.outcomes[1], results(&[Err("out of memory")]).outcomes[0]);
        assert!(found.outcomes.iter().all(Outcome::is_plausible));
        assert_eq!(seen.iter().filter(|seen| *seen == "Measured").count(), 2);
        assert!(seen.contains(&r#"Line("working")"#.to_owned()), "{seen:?}");
    }

    #[cfg(unix)]
    #[test]
    fn a_script_that_fails_is_an_error_with_its_last_lines() {
        let (outcome, _) = answer("for n in $(seq 30); do echo line $n >&2; done; exit 7", 1);
        let error = format!("{:#}", outcome.unwrap_err());
        assert!(error.contains("script.sh failed (exit status: 7)") && error.contains("line 30"), "{error}");
        assert!(error.contains("line 19") && !error.contains("line 18"), "{error}");
        let nothing = run(OsStr::new("/no/such/python"), MOE, &json!({}), 0, &mut |_| {});
        let error = format!("{:#}", nothing.unwrap_err());
        assert!(error.contains("cannot run /no/such/python"), "{error}");
    }

    #[cfg(unix)]
    #[test]
    fn what_was_measured_before_a_failure_is_kept() {
        let shell = format!(
            r#"{TORCH} echo '{{"kind": "result", "job": 1, "launches": 1, "replays": [2.0]}}'; exit 134"#
        );
        let found = answer(&shell, 3).0.unwrap();
        let failed = Err("script.sh failed (exit status: 134)");
        let expected = results(&[failed, Ok(2.0), failed]);
        assert_eq!((&found.outcomes[0], &found.outcomes[2]), (&expected.outcomes[0], &expected.outcomes[2]));
        assert_eq!(found.outcomes[1].timing.unwrap().us, 2.0);
        // Nothing was measured.
        assert!(answer(&format!("{TORCH} exit 134"), 3).0.is_err());
    }

    #[cfg(unix)]
    #[test]
    fn answers_that_are_missing_doubled_or_impossible_are_errors() {
        let result = |job: usize, us: f64| {
            format!("echo '{{\"kind\": \"result\", \"job\": {job}, \"launches\": 1, \"replays\": [{us}]}}';")
        };
        for (shell, expected) in [
            (result(0, 1.0), "did not say which torch"),
            (format!("{TORCH} {}", result(0, 1.0)), "1 of 2 measurements are missing"),
            (format!("{TORCH} {0} {0}", result(1, 1.0)), "a second answer"),
            (format!("{TORCH} {}", result(2, 1.0)), "not one of 2 jobs"),
            (format!("{TORCH} {}", result(0, -1.0)), "an impossible time"),
            // The script is ended, not waited for.
            ("echo hello; exec sleep 600".into(), "not understood: hello"),
        ] {
            let error = format!("{:#}", answer(&shell, 2).0.unwrap_err());
            assert!(error.contains(expected), "{expected:?} is missing in {error}");
        }
    }

    #[test]
    fn equal_reasons_share_a_footnote() {
        let mut notes = Footnotes::default();
        assert_eq!(notes.text(), "");
        let marks = ["a", "b", "a"].map(|reason| notes.mark(reason));
        assert_eq!(marks, ["[^1]", "[^2]", "[^1]"]);
        assert_eq!(notes.text(), "\n[^1]: torch: a\n\n[^2]: torch: b\n");
    }
}
