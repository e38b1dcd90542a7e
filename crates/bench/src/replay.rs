//! Times kernels. The launches of a kernel are captured in a CUDA graph, the graph is replayed,
//! and events around each replay give its time.
//! Launch costs on the host are then not measured, and launches follow one another as they do in a server.

use std::fmt;
use std::ptr;
use std::time::Duration;

use cust::event::{Event, EventFlags};
use cust::stream::Stream;
use cust::sys::{self, CUgraph, CUgraphExec, CUstreamCaptureMode_enum};
use serde::{Deserialize, Serialize};

use super::driver::During;
use super::statistics::Timing;

/// How long each kernel is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pace {
    /// Turns for each kernel. All kernels take turns, so that a slow drift of the clocks affects all alike.
    turns: usize,
    /// Idle time before each turn, in milliseconds.
    /// Without it, a kernel would find a GPU that another one has heated or throttled.
    rest_ms: u64,
    /// Replays at the beginning of each turn that are not timed.
    warm_up_replays: usize,
    /// Timed replays in each turn. They are back to back, so a kernel is timed under its own power draw.
    replays: usize,
}

impl Pace {
    /// For results. Each kernel takes 120 ms of idle time and 16 replays of 1 to 15 ms.
    pub const THOROUGH: Self = Self { turns: 2, rest_ms: 60, warm_up_replays: 2, replays: 6 };
    /// For many points: a third of the time, with about as much idle time per replay.
    /// Each kernel takes 40 ms of idle time and 6 replays.
    pub const BRIEF: Self = Self { turns: 2, rest_ms: 20, warm_up_replays: 1, replays: 2 };
    /// For ranking many plans.
    pub(super) const RANKING: Self = Self { turns: 1, rest_ms: 20, warm_up_replays: 1, replays: 3 };
}

/// The pace of runs that were recorded before there was a choice.
impl Default for Pace {
    fn default() -> Self {
        Self::THOROUGH
    }
}

impl fmt::Display for Pace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { turns, rest_ms, warm_up_replays, replays } = self;
        write!(
            f,
            "{turns} turns, each {rest_ms} ms of rest, then warm-up replays: {warm_up_replays}, timed replays: {replays}"
        )
    }
}

/// Least length of a replay, in microseconds, at which the start of the graph does not matter.
const SHORT_REPLAY_US: f64 = 1_000.0;
/// Greatest length of a replay, in microseconds.
const LONG_REPLAY_US: f64 = 15_000.0;
/// Launches in one graph, within the limits on the length of a replay.
const LAUNCHES: std::ops::RangeInclusive<usize> = 20..=100;

/// The rules of timing, for scripts that time other kernels in the same way.
pub(super) fn rules(pace: Pace) -> serde_json::Value {
    serde_json::json!({
        "pace": pace,
        "short_replay_us": SHORT_REPLAY_US,
        "long_replay_us": LONG_REPLAY_US,
        "launches": [LAUNCHES.start(), LAUNCHES.end()],
    })
}

/// A kernel to be timed.
pub(super) struct Contender<'a> {
    /// Copies of the weights; launch `i` uses copy `i % copies`.
    pub(super) copies: usize,
    /// Launches the kernel with the given copy of the weights.
    pub(super) launch: Box<dyn Fn(usize) -> anyhow::Result<()> + 'a>,
}

impl Contender<'_> {
    fn launch(&self, index: usize) -> anyhow::Result<()> {
        (self.launch)(index % self.copies.max(1))
    }
}

/// Times launches on one stream.
pub(super) struct Clock<'s> {
    stream: &'s Stream,
    pace: Pace,
    start: Event,
    end: Event,
}

impl<'s> Clock<'s> {
    pub(super) fn new(stream: &'s Stream, pace: Pace) -> anyhow::Result<Self> {
        Ok(Self {
            stream,
            pace,
            start: Event::new(EventFlags::DEFAULT)?,
            end: Event::new(EventFlags::DEFAULT)?,
        })
    }

    /// Times every contender. A failure is returned in the contender's place, and the others are still timed.
    pub(super) fn measure(&self, contenders: &[Contender<'_>]) -> Vec<anyhow::Result<Timing>> {
        let mut races: Vec<anyhow::Result<Race>> =
            contenders.iter().map(|contender| self.prepare(contender)).collect();
        for _ in 0..self.pace.turns {
            for race in &mut races {
                std::thread::sleep(Duration::from_millis(self.pace.rest_ms));
                if let Ok(ready) = race
                    && let Err(error) = self.turn(ready)
                {
                    *race = Err(error);
                }
            }
        }
        let timing = |race: Race| {
            Timing::new(race.replays, race.graph.launches)
                .ok_or_else(|| anyhow::anyhow!("no replay was timed"))
        };
        races.into_iter().map(|race| race.and_then(timing)).collect()
    }

    /// Estimates microseconds per launch from a few launches without a graph.
    /// The result is slightly larger than the time within a graph.
    pub(super) fn estimate(&self, contender: &Contender<'_>) -> anyhow::Result<f64> {
        const LAUNCHES: usize = 3;
        // The first launch may load the kernel.
        contender.launch(0)?;
        self.stream.synchronize()?;
        self.start.record(self.stream)?;
        (0..LAUNCHES).try_for_each(|index| contender.launch(index))?;
        Ok(self.elapsed_us()? / LAUNCHES as f64)
    }

    fn prepare(&self, contender: &Contender<'_>) -> anyhow::Result<Race> {
        let launches = launches(self.estimate(contender)?, contender.copies);
        let graph = Graph::capture(self.stream, launches, contender)?;
        Ok(Race { graph, replays: Vec::new() })
    }

    fn turn(&self, race: &mut Race) -> anyhow::Result<()> {
        for replay in 0..self.pace.warm_up_replays + self.pace.replays {
            self.start.record(self.stream)?;
            race.graph.launch(self.stream)?;
            let us = self.elapsed_us()? / race.graph.launches as f64;
            if replay >= self.pace.warm_up_replays {
                race.replays.push(us);
            }
        }
        Ok(())
    }

    /// Waits for the stream and returns the microseconds since `start`.
    fn elapsed_us(&self) -> anyhow::Result<f64> {
        self.end.record(self.stream)?;
        self.end.synchronize()?;
        Ok(f64::from(self.end.elapsed_time_f32(&self.start)?) * 1e3)
    }
}

/// The graph of a contender and the times of its replays so far.
struct Race {
    graph: Graph,
    replays: Vec<f64>,
}

/// Number of launches in a graph, if possible a multiple of `copies`, so that no copy is reused early.
fn launches(us: f64, copies: usize) -> usize {
    let us = us.max(0.1);
    let at_most = ((LONG_REPLAY_US / us) as usize).max(2);
    let wanted = ((SHORT_REPLAY_US / us) as usize).clamp(*LAUNCHES.start(), *LAUNCHES.end()).min(at_most);
    let whole_rounds = wanted.next_multiple_of(copies.max(1));
    if whole_rounds <= at_most { whole_rounds } else { wanted }
}

/// An instantiated CUDA graph of launches.
struct Graph {
    executable: CUgraphExec,
    launches: usize,
}

impl Graph {
    fn capture(stream: &Stream, launches: usize, contender: &Contender<'_>) -> anyhow::Result<Self> {
        // In the relaxed mode, a library may allocate memory during the capture; that is slow but correct.
        let mode = CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream is alive.
        unsafe { sys::cuStreamBeginCapture_v2(stream.as_inner(), mode) }.during("capturing a graph")?;
        let launched = (0..launches).try_for_each(|index| contender.launch(index));
        let mut graph: CUgraph = ptr::null_mut();
        // End the capture even if a launch has failed, because the stream is unusable until then.
        // SAFETY: the stream is alive and the argument is valid for a write.
        let ended =
            unsafe { sys::cuStreamEndCapture(stream.as_inner(), &mut graph) }.during("ending a capture");
        let instantiated = launched.and_then(|()| {
            ended?;
            let mut executable = ptr::null_mut();
            // SAFETY: the graph came from the capture, and the argument is valid for a write.
            unsafe { sys::cuGraphInstantiateWithFlags(&mut executable, graph, 0) }
                .during("instantiating a graph")?;
            Ok(Self { executable, launches })
        });
        if !graph.is_null() {
            // SAFETY: the graph came from the capture, and the instantiated graph does not depend on it.
            unsafe { sys::cuGraphDestroy(graph) };
        }
        instantiated
    }

    fn launch(&self, stream: &Stream) -> anyhow::Result<()> {
        // SAFETY: graph and stream are alive.
        // The contender keeps everything alive that the launches use.
        unsafe { sys::cuGraphLaunch(self.executable, stream.as_inner()) }.during("replaying a graph")
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: nothing else destroys the graph. A failure can't be reported from here.
        unsafe { sys::cuGraphExecDestroy(self.executable) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_kernels_get_many_launches_and_long_ones_few() {
        assert_eq!(launches(3.0, 1), 100);
        assert_eq!(launches(30.0, 1), 33);
        assert_eq!(launches(200.0, 1), 20);
        assert_eq!(launches(3_000.0, 1), 5);
        assert_eq!(launches(20_000.0, 1), 2);
    }

    #[test]
    fn graphs_use_all_copies_equally_unless_that_takes_too_long() {
        assert_eq!(launches(30.0, 25), 50);
        assert_eq!(launches(3.0, 400), 400);
        assert_eq!(launches(3_000.0, 2), 5);
        assert!(launches(f64::NAN, 0) >= 2);
    }
}
