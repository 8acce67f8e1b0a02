"""A driver that takes a moment: what a sweep sees of a real one, without JAX."""

import json
import os
import signal
import sys
import time
from pathlib import Path

from absl import app, flags

flags.DEFINE_enum("attack", "badnet", ["badnet", "sig"], "Named in the results.")
flags.DEFINE_integer("seed", 0, "Named in the results.", lower_bound=0)
flags.DEFINE_list("coupling", ["topk_ccc"], "Rows of the results.")
flags.DEFINE_float("seconds", 0.0, "How long it takes.")
flags.DEFINE_string("count", None, "File that gets a line at the start and one at the end.")
flags.DEFINE_string("fail_while", None, "Fails while this file exists.")
flags.DEFINE_bool("preemptible", False, "Ends with 75 on SIGTERM.")
flags.DEFINE_multi_string("extra", [], "At most one.")
flags.register_validator("extra", lambda values: len(values) <= 1, "wanted one")
flags.DEFINE_bool("bare", False, "Results in a schema of its own.")
flags.DEFINE_string("workdir", "", "Folder for results.")


def main(_):
    values = flags.FLAGS
    if values.preemptible:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    workdir = Path(values.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    _count("start")
    if values.fail_while and Path(values.fail_while).exists():
        print("error: seed: wanted a better one", file=sys.stderr)
        sys.exit(1)
    time.sleep(values.seconds)
    (workdir / "results.json").write_text(json.dumps({"config": {}, "rows": list(map(_row, values.coupling))}))
    _count("end")


def _count(event):
    if flags.FLAGS.count:
        # one short write in append mode is whole, whoever else writes
        line = f"{event} {Path(flags.FLAGS.workdir).name} {os.getpid()}\n"
        descriptor = os.open(flags.FLAGS.count, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, line.encode())
        os.close(descriptor)


def _row(coupling):
    values = flags.FLAGS
    row = {"attack": values.attack, "seed": values.seed, "acc": 0.9, "asr": None if values.attack == "sig" else 1.0}
    if values.bare:
        return row
    figures = {"auroc": 0.8 + 0.1 * values.seed, "auroc_same_prediction": 0.5, "ap": 0.5, "realized_fpr": 0.05}
    figures |= {"tpr": 0.5, "der": 0.5, "sweep_seconds": 1.0}
    recall = {"0.01": 0.5, "0.05": 0.5}
    more = {"sampler": "gaussian", "coupling": coupling, "recall_at_fpr": recall, "num_draws": 8, "scale": None}
    return {**row, **figures, **more}


if __name__ == "__main__":
    app.run(main)
