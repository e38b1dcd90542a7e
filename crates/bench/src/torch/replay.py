"""Times torch's kernels as `replay.rs` times ours, and reports to the bench.

The launches of a kernel are captured in a CUDA graph, the graph is replayed, and events around each replay
give its time. Results are JSON lines on stdout, everything else goes to stderr. The request is a JSON file,
whose path is the only argument; `torch/mod.rs` writes it and reads the results.
"""

import gc
import json
import os
import sys
import time
import traceback

BEGAN = time.monotonic()

# Libraries may print to stdout, so results get a descriptor of their own and stdout becomes stderr.
_results = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

import torch  # noqa: E402: an import that fails must already write to stderr


def note(text):
    """Reports progress."""
    print(text, file=sys.stderr, flush=True)


def _emit(**line):
    print(json.dumps(line), file=_results, flush=True)


class Clock:
    """Times launches on one stream."""

    def __init__(self, rules):
        self.pace = rules["pace"]
        self.short_us, self.long_us = rules["short_replay_us"], rules["long_replay_us"]
        self.least, self.most = rules["launches"]
        self.stream = torch.cuda.Stream()
        self.start = torch.cuda.Event(enable_timing=True)
        self.end = torch.cuda.Event(enable_timing=True)

    def measure(self, launch, copies):
        """Returns the number of launches in a graph, and microseconds a launch for every timed replay.

        `launch(i)` launches the kernel on copy `i` of its operands, and returns what it has allocated.
        """
        with torch.cuda.stream(self.stream):
            # The first launch may compile or load the kernel.
            launch(0)
            self.stream.synchronize()
            self.start.record()
            for copy in range(3):
                launch(copy % copies)
            # Without a graph the host may be slower than a short kernel, so a first graph gives the estimate.
            rough = min(self.least, max(2, int(self.long_us / (self._elapsed_us() / 3))))
        graph, kept = self._capture(launch, rough, copies)
        self._replay(graph, rough)
        launches = self._launches(self._replay(graph, rough), copies)
        if launches != rough:
            del kept
            graph.reset()
            graph, kept = self._capture(launch, launches, copies)
        replays = []
        for _ in range(self.pace["turns"]):
            time.sleep(self.pace["rest_ms"] / 1e3)
            for replay in range(self.pace["warm_up_replays"] + self.pace["replays"]):
                us = self._replay(graph, launches)
                if replay >= self.pace["warm_up_replays"]:
                    replays.append(us)
        del kept
        graph.reset()
        return launches, replays

    def _launches(self, us, copies):
        """The twin of `launches` in `replay.rs`."""
        us = max(us, 0.1)
        at_most = max(int(self.long_us / us), 2)
        wanted = min(max(int(self.short_us / us), self.least), self.most, at_most)
        whole_rounds = -(-wanted // copies) * copies
        return whole_rounds if whole_rounds <= at_most else wanted

    def _capture(self, launch, launches, copies):
        graph = torch.cuda.CUDAGraph()
        # Outputs stay alive until their copy's turn comes again, so they rotate as the inputs do.
        kept = [None] * copies
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=self.stream):
            for index in range(launches):
                kept[index % copies] = launch(index % copies)
        return graph, kept

    def _replay(self, graph, launches):
        with torch.cuda.stream(self.stream):
            self.start.record()
            graph.replay()
            return self._elapsed_us() / launches

    def _elapsed_us(self):
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) * 1e3


def run(measure):
    """Measures every job of the request with `measure(clock, job)`, which returns what `Clock.measure` does.

    A job that fails is reported with the reason, and the others are still measured. So is each job that the
    time does not suffice for.
    """
    with open(sys.argv[1], encoding="utf-8") as file:
        request = json.load(file)
    if not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} finds no usable CUDA device")
    torch.cuda.set_device(request["device"])
    _emit(
        kind="torch",
        version=torch.__version__,
        cuda=str(torch.version.cuda),
        device=torch.cuda.get_device_name(),
    )
    torch.manual_seed(1)
    # A capture collects garbage, which is quick if torch's own objects are left out.
    gc.freeze()
    with torch.no_grad():
        clock = Clock(request["clock"])
        for number, job in enumerate(request["jobs"]):
            seconds = time.monotonic() - BEGAN
            if seconds > request["budget_s"]:
                _emit(kind="failure", job=number, error=f"not measured within {request['budget_s']} s")
                continue
            note(f"{job['name']} ({seconds:.0f} s)")
            try:
                launches, replays = measure(clock, job)
                _emit(kind="result", job=number, launches=launches, replays=replays)
            except Exception as error:  # whatever it is, the other jobs are still worth measuring
                traceback.print_exc()
                first = (str(error).strip() or "no message").splitlines()[0]
                _emit(kind="failure", job=number, error=f"{type(error).__name__}: {first}"[:300])
    note(f"finished in {time.monotonic() - BEGAN:.0f} s")
