"""A fake gcloud: a request, its workers and a bucket in one folder.

It records each call in `calls.jsonl`, runs the commands of ssh in one folder for each worker, and
fails as `faults.json` says: a list of `{"match", "times", "err", "out", "code", "state"}`. The
first that matches the call's words and has times left applies; `state` is then the request's.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

CLOUD = Path(os.environ["FAKE_CLOUD"])
STATE, BUCKET = CLOUD / "state", CLOUD / "bucket"


def main(words: list[str]) -> int:
    with (CLOUD / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps(words) + "\n")
    fault = next_fault(" ".join(words))
    if fault is not None:
        if "state" in fault:
            STATE.write_text(fault["state"])
        sys.stdout.write(fault.get("out", ""))
        sys.stderr.write(fault.get("err", ""))
        return fault.get("code", 1)
    if words[:3] == ["compute", "tpus", "queued-resources"]:
        return request(words[3], words)
    if words[:4] == ["compute", "tpus", "tpu-vm", "describe"]:
        print("READY" if "--format=value(state)" in words else "\n".join(addresses(words[4])))
        return 0
    if words[0] == "storage":
        return storage(words[1], [word for word in words[2:] if not word.startswith("--")])
    if words[0] == "auth":
        print("someone@example.com")
    return 0


def next_fault(call: str) -> dict | None:
    path = CLOUD / "faults.json"
    faults = json.loads(path.read_text())
    for fault in faults:
        if fault["match"] in call and fault.get("times", 1):
            fault["times"] = fault.get("times", 1) - 1
            path.write_text(json.dumps(faults))
            return fault
    return None


def workers() -> list[Path]:
    return sorted(CLOUD.glob("worker*"))


def addresses(node: str) -> list[str]:
    """Those of a node's workers: all of them, or with several slices the one of its number."""
    number = node.rpartition("-")[2] if "-" in node else ""
    return [w.name for w in workers() if w.name.endswith(number)]


def request(verb: str, words: list[str]) -> int:
    if verb == "create":
        STATE.write_text("ACTIVE")
    elif not STATE.exists():
        print(f"ERROR: (gcloud) NOT_FOUND: Resource {words[4]} was not found", file=sys.stderr)
        return 1
    elif verb == "describe":
        print(STATE.read_text())
    elif verb == "delete":
        STATE.unlink()
    elif verb == "ssh":
        command = next(w for w in words if w.startswith("--command=")).removeprefix("--command=")
        return max(subprocess.run(["bash", "-c", command], cwd=w).returncode for w in workers())
    return 0


def storage(verb: str, places: list[str]) -> int:
    paths = [BUCKET / p.split("/", 3)[3] if p.startswith("gs://") else Path(p) for p in places if
             p.count("/") > 2 or not p.startswith("gs://")]  # fmt: skip
    if verb == "ls":
        for path in sorted(paths[0].iterdir()) if paths[0].is_dir() else []:
            print(f"gs://b/{path.relative_to(BUCKET)}")
        return int(not paths[0].exists())
    if verb == "cat":
        sys.stdout.buffer.write(paths[0].read_bytes())
    elif verb == "rsync":
        shutil.copytree(paths[0], paths[1], dirs_exist_ok=True)
    elif verb == "cp":
        for pattern in paths[:-1]:
            for file in pattern.parent.glob(pattern.name):
                paths[-1].parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, paths[-1])
    return 0


sys.exit(main(sys.argv[1:]))
