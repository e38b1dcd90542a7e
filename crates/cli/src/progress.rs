//! Progress on stderr for work that takes longer than a second. Quicker work shows nothing, and neither does
//! any where stderr is no terminal.

use std::thread;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

const PATIENCE: Duration = Duration::from_secs(1);

/// A running piece of work; what it has drawn goes away when it is dropped.
pub(super) struct Progress(ProgressBar);

impl Progress {
    /// Work of `steps` equal steps, each reported through [`step`](Self::step).
    pub(super) fn bar(what: &'static str, steps: usize) -> Self {
        let style = ProgressStyle::with_template("{msg:12} {wide_bar} {percent:>3} %  {eta} left")
            .expect("the template is valid");
        Self::start(
            ProgressBar::with_draw_target(Some(steps as u64), ProgressDrawTarget::hidden()),
            what,
            style,
        )
    }

    /// Work that cannot tell how far it is.
    pub(super) fn spinner(what: &'static str) -> Self {
        let style =
            ProgressStyle::with_template("{msg:12} {spinner} {elapsed}").expect("the template is valid");
        Self::start(ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden()), what, style)
    }

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

    pub(super) fn step(&self) {
        self.0.inc(1);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
