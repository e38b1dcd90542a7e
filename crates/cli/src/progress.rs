//! Progress on stderr for work that takes longer than a second, drawn with `indicatif`.
//! Quicker work shows nothing, and nothing is shown if stderr is not a terminal.

use std::thread;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::models::printable;

/// Time until progress is shown.
const PATIENCE: Duration = Duration::from_secs(1);

/// The progress of running work. Dropping it clears what it has drawn.
pub(super) struct Progress(ProgressBar);

impl Progress {
    /// Starts a bar for work of `steps` equal steps, each reported through [`step`](Self::step).
    pub(super) fn bar(what: &'static str, steps: usize) -> Self {
        let style = ProgressStyle::with_template("{msg:12} {wide_bar} {percent:>3} %  {eta} left")
            .expect("the template is valid");
        Self::start(
            ProgressBar::with_draw_target(Some(steps as u64), ProgressDrawTarget::hidden()),
            what,
            style,
        )
    }

    /// Starts a bar for work that goes through the bytes of a model. The work itself says how many there are.
    pub(super) fn bytes(what: &'static str) -> Self {
        let style = ProgressStyle::with_template("{msg} {wide_bar} {percent:>3} %  {eta} left")
            .expect("the template is valid");
        Self::start(ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::hidden()), what, style)
    }

    /// Starts a spinner for work whose progress is unknown.
    pub(super) fn spinner(what: &'static str) -> Self {
        let style =
            ProgressStyle::with_template("{msg:12} {spinner} {elapsed}").expect("the template is valid");
        Self::start(ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden()), what, style)
    }

    /// Shows the bar after [`PATIENCE`], unless the work has finished by then.
    fn start(bar: ProgressBar, what: &'static str, style: ProgressStyle) -> Self {
        bar.set_style(style);
        bar.set_message(what);
        let later = bar.clone();
        thread::spawn(move || {
            thread::sleep(PATIENCE);
            if !later.is_finished() {
                later.set_draw_target(ProgressDrawTarget::stderr());
                later.enable_steady_tick(Duration::from_millis(100));
            }
        });
        Self(bar)
    }

    /// Reports one finished step.
    pub(super) fn step(&self) {
        self.0.inc(1);
    }
}

impl liquidgemm_checkpoint::Progress for Progress {
    fn begin(&self, bytes: u64) {
        self.0.set_length(bytes);
    }

    fn item(&self, name: &str) {
        self.0.set_message(printable(name));
    }

    fn advance(&self, bytes: u64) {
        self.0.inc(bytes);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// The progress of work that comes in stages, one bar after another.
#[cfg(feature = "eval")]
#[derive(Default)]
pub(super) struct Stages(std::cell::RefCell<Option<Progress>>);

#[cfg(feature = "eval")]
impl Stages {
    /// Shows a spinner while `work` runs.
    pub(super) fn spinner<T>(&self, what: &'static str, work: impl FnOnce() -> T) -> T {
        let _progress = Progress::spinner(what);
        work()
    }
}

#[cfg(feature = "eval")]
impl liquidgemm_eval::Progress for Stages {
    fn begin(&self, what: &'static str, steps: usize) {
        *self.0.borrow_mut() = Some(Progress::bar(what, steps));
    }

    fn step(&self) {
        if let Some(bar) = &*self.0.borrow() {
            bar.step();
        }
    }
}
