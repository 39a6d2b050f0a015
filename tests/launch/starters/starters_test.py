"""Starters against programs that stand for gcloud, sbatch and kubectl."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

from absl.testing import absltest
from absl.testing import parameterized

_STARTERS = pathlib.Path(__file__).parents[3] / "launch" / "starters"
# Writes down how it was called. What runs is a file that `create`, `apply` and
# `sbatch` make and `delete` and `scancel` remove.
_STUB = """#!{python}
import json, os, pathlib, sys, time
here = pathlib.Path(__file__).parent
name, words = pathlib.Path(__file__).name, sys.argv[1:]
reads = "apply" in words
call = [name, *words]
with (here / "calls").open("a") as log:
  log.write(json.dumps([call, sys.stdin.read() if reads else ""]) + "\\n")
text = " ".join(call)
running = here / "running"
starts = ("create", "apply", "--parsable")
if any(word in words for word in starts):
  running.touch()
fault = os.environ.get("STUB_FAULT", "")
if fault and fault in text:
  sys.exit(int(os.environ.get("STUB_STATUS", "7")))
if "delete" in words or name == "scancel":
  running.unlink(missing_ok=True)
slow = os.environ.get("STUB_SLOW", "")
if slow and slow in text:
  (here / "reached").touch()
  time.sleep(60)
answers = json.loads(os.environ.get("STUB_ANSWERS", "{{}}"))
for part, answer in answers.items():
  if part in text:
    print(answer)
    break
else:
  if "describe" in words and "tpu-vm" in words:
    print("READY") if running.exists() else sys.exit(1)
"""
_TPU = (
    *("--name=run1", "--project=p", "--zone=z", "--type=v5p-128"),
    *("--script=train_lm", "--workdir=/mnt/run1"),
)
_SLURM = ("--name=run1", "--nodes=4", "--script=train_lm")
_GKE = (
    *("--name=run1", "--image=i", "--accelerator=tpu-v5p-slice", "--hosts=2"),
    *("--topology=2x2x2", "--claim=c", "--script=train_lm"),
    "--workdir=/data/run1",
)
_PLACE = ["--project=p", "--zone=z"]


class StartersTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    for name in ("gcloud", "sbatch", "squeue", "sacct", "scancel", "kubectl"):
      path = self.folder / name
      path.write_text(_STUB.format(python=sys.executable))
      path.chmod(0o755)
    self.workdir = self.folder / "shared"

  def env(self, **more):
    path = f"{self.folder}{os.pathsep}{os.environ['PATH']}"
    poll = {"STARTER_POLL_SECONDS": "0.01"}
    return os.environ | poll | {"PATH": path} | more

  def start(self, name, *flags, answers=None, **more):
    if answers is not None:
      more["STUB_ANSWERS"] = json.dumps(answers)
    return subprocess.run(
        [_STARTERS / name, *flags],
        env=self.env(**more),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

  def calls(self):
    lines = (self.folder / "calls").read_text().splitlines()
    return [json.loads(line) for line in lines]

  def is_running(self):
    return (self.folder / "running").exists()

  def test_a_slice_is_made_used_and_deleted(self):
    flagfile = self.folder / "flags.txt"
    flagfile.write_text("--seed=3\n")
    done = self.start(
        "tpu_vm.sh",
        *(*_TPU, "--spot", f"--collect={self.folder}/out"),
        *(f"--flagfile={flagfile}", "--", "--corpus=a b"),
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    vm = ["gcloud", "compute", "tpus", "tpu-vm"]
    calls = [call for call, _ in self.calls()]
    packed = calls[2][5]
    all_workers = [*_PLACE, "--worker=all"]
    self.assertEqual(
        calls[:4],
        [
            [*vm, "describe", "run1", *_PLACE, "--format=value(state)"],
            [
                *(*vm, "create", "run1", *_PLACE),
                *("--accelerator-type=v5p-128",),
                *("--version=tpu-ubuntu2204-base", "--spot"),
            ],
            [*vm, "scp", packed, "run1:tree.tgz", *all_workers],
            [*vm, "scp", str(flagfile), "run1:flags.txt", *all_workers],
        ],
    )
    self.assertFalse(pathlib.Path(packed).exists())
    install, work, collect, delete = calls[4:]
    self.assertEqual(install[:-1], [*vm, "ssh", "run1", *all_workers])
    self.assertIn("pip install", install[-1])
    self.assertEqual(
        work[-1],
        "--command=cd tree && ../env/bin/python -m launch.train_lm"
        r" --flagfile=../flags.txt --multihost --workdir=/mnt/run1"
        r" --corpus=a\ b",
    )
    self.assertEqual(
        collect[4:],
        [
            *("scp", "--recurse", "run1:/mnt/run1", f"{self.folder}/out"),
            *(*_PLACE, "--worker=0"),
        ],
    )
    self.assertEqual(delete[4:], ["delete", "run1", *_PLACE, "--quiet"])
    self.assertFalse(self.is_running())

  def test_a_queued_resource_is_waited_for(self):
    done = self.start(
        "tpu_vm.sh",
        *(*_TPU, "--queued"),
        answers={"queued-resources describe": "ACTIVE"},
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    calls = [call[3:] for call, _ in self.calls()]
    self.assertEqual(
        calls[1],
        [
            *("queued-resources", "create", "run1", "--node-id=run1", *_PLACE),
            *("--accelerator-type=v5p-128",),
            "--runtime-version=tpu-ubuntu2204-base",
        ],
    )
    self.assertEqual(
        calls[-1],
        ["queued-resources", "delete", "run1", *_PLACE, "--force", "--quiet"],
    )

  def test_a_queued_resource_that_fails_is_deleted(self):
    done = self.start(
        "tpu_vm.sh",
        *(*_TPU, "--queued"),
        answers={"queued-resources describe": "FAILED"},
    )
    self.assertEqual(done.returncode, 1)
    self.assertIn("error: the queued resource is FAILED", done.stderr)
    self.assertFalse(self.is_running())

  def test_a_slice_that_is_ready_is_used_and_left(self):
    done = self.start("tpu_vm.sh", *_TPU, answers={"tpu-vm describe": "READY"})
    self.assertEqual(done.returncode, 0, done.stderr)
    words = sum((call for call, _ in self.calls()), [])
    self.assertNotIn("create", words)
    self.assertNotIn("delete", words)
    busy = self.start(
        "tpu_vm.sh", *_TPU, answers={"tpu-vm describe": "CREATING"}
    )
    self.assertEqual(busy.returncode, 2)
    self.assertIn("it is CREATING", busy.stderr)

  @parameterized.parameters(
      ("tpu-vm create", "could not be created", 1),
      ("tree.tgz", "could not be installed", 1),
      ("pip install", "could not be installed", 1),
      ("launch.train_lm", "the script ended with status 7", 7),
      ("--recurse", "could not be copied", 1),
  )
  def test_whatever_fails_is_said_and_nothing_goes_on(
      self, fault, message, status
  ):
    done = self.start(
        "tpu_vm.sh", *_TPU, f"--collect={self.folder}/out", STUB_FAULT=fault
    )
    self.assertEqual(done.returncode, status, done.stderr)
    self.assertIn(f"{message}", done.stderr)
    self.assertFalse(self.is_running())

  def test_a_slice_that_stays_is_named(self):
    done = self.start("tpu_vm.sh", *_TPU, STUB_FAULT="delete")
    self.assertEqual(done.returncode, 0)
    self.assertRegex(done.stderr, "run1 could not be deleted .* tpu-vm delete")

  def test_a_slice_is_kept_where_that_is_asked_for(self):
    done = self.start("tpu_vm.sh", *_TPU, "--keep")
    self.assertEqual(done.returncode, 0)
    self.assertIn("kept: run1 goes on running", done.stderr)
    self.assertTrue(self.is_running())

  @parameterized.parameters(
      ("tpu_vm.sh", _TPU, "launch.train_lm"), ("gke.sh", _GKE, "logs")
  )
  def test_a_signal_ends_it_and_deletes(self, name, flags, where):
    process = subprocess.Popen(
        [_STARTERS / name, *flags],
        env=self.env(
            STUB_SLOW=where, STUB_ANSWERS=json.dumps({"get job": "2/"})
        ),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    reached, until = self.folder / "reached", time.monotonic() + 30
    while not reached.exists() and time.monotonic() < until:
      time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    self.assertEqual(process.wait(timeout=30), 143)
    self.assertFalse(self.is_running())

  def test_a_job_is_submitted_and_followed(self):
    done = self.start(
        "slurm.sh",
        *(*_SLURM, "--gpus=8", "--time=04:00:00", f"--workdir={self.workdir}"),
        *("--partition=gpu", "--account=a", "--wait", "--", "--num_steps=9"),
        answers={"sbatch": "77;cluster", "sacct": "COMPLETED"},
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertEqual(done.stdout, "77\n")
    calls = [call for call, _ in self.calls()]
    self.assertEqual(
        calls[0],
        [
            *("sbatch", "--parsable", "--job-name=run1", "--nodes=4"),
            *("--ntasks-per-node=1", "--time=04:00:00", "--signal=TERM@120"),
            f"--output={self.workdir}/slurm-%j.out",
            *("--gpus-per-node=8", "--partition=gpu", "--account=a"),
            *("--no-requeue", str(_STARTERS / "job.sbatch")),
            *("python3", "-m", "launch.train_lm", "--multihost"),
            *(f"--workdir={self.workdir}", "--grace=108", "--num_steps=9"),
        ],
    )
    self.assertEqual([call[0] for call in calls[1:]], ["squeue", "sacct"])

  @parameterized.parameters(
      (dict(STUB_FAULT="sbatch"), "sbatch refused the job"),
      ({}, "job 77 is FAILED; see .*slurm-77.out"),
  )
  def test_a_job_that_fails_is_said(self, fault, message):
    done = self.start(
        "slurm.sh",
        *(*_SLURM, f"--workdir={self.workdir}", "--wait"),
        answers={"sbatch": "77", "sacct": "FAILED"},
        **fault,
    )
    self.assertEqual(done.returncode, 1)
    self.assertRegex(done.stderr, message)

  def test_pods_are_applied_followed_and_deleted(self):
    flagfile = self.folder / "flags.txt"
    flagfile.write_text("--seed=3\n--corpus=x\n")
    done = self.start(
        "gke.sh",
        *(*_GKE, f"--flagfile={flagfile}", "--", "--tokenizer=it's"),
        answers={"get job": "2/"},
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    calls = self.calls()
    words = [call[2] for call, _ in calls]
    self.assertEqual(words, ["apply", "get", "logs", "delete"])
    text = calls[0][1]
    for line in (
        "  completions: 2",
        "        cloud.google.com/gke-tpu-topology: '2x2x2'",
        "          limits: {google.com/tpu: 4}",
        "    --seed=3\n    --corpus=x",
        "        - '--flagfile=/flags/flags.txt'",
        "        - '--tokenizer=it''s'",
    ):
      self.assertIn(line, text)
    self.assertFalse(self.is_running())

  @parameterized.parameters(
      (dict(answers={"get job": "1/1"}), "1 of 2 pods failed"),
      (dict(STUB_FAULT="apply"), "was not applied"),
      (dict(STUB_FAULT="get job"), ""),
  )
  def test_pods_that_fail_are_said_and_deleted(self, fault, message):
    done = self.start("gke.sh", *_GKE, **fault)
    self.assertEqual(done.returncode, 1)
    self.assertIn(message, done.stderr)
    self.assertFalse(self.is_running())

  @parameterized.parameters(
      ("tpu_vm.sh", (*_TPU, "--queued")),
      ("slurm.sh", _SLURM),
      ("gke.sh", _GKE),
  )
  def test_a_dry_run_prints_and_runs_nothing(self, name, flags):
    if name == "slurm.sh":
      flags = (*flags, f"--workdir={self.workdir}")
    done = self.start(name, *flags, "--dry_run")
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertFalse((self.folder / "calls").exists())
    self.assertIn("launch.train_lm", done.stdout)
    self.assertFalse(self.workdir.exists())

  @parameterized.parameters(
      ("tpu_vm.sh", (*_TPU, "--nam=x"), "unknown option --nam"),
      ("tpu_vm.sh", _TPU[1:], "--name is required"),
      ("tpu_vm.sh", (*_TPU, "--name=a;b"), "must be up to 40"),
      ("tpu_vm.sh", (*_TPU, "--script=../x"), "must name a script"),
      ("tpu_vm.sh", (*_TPU, "--workdir=here"), "absolute path"),
      ("tpu_vm.sh", (*_TPU, "--flagfile=/none"), "no such file"),
      ("tpu_vm.sh", (*_TPU, "--wait=1h"), "whole number"),
      ("tpu_vm.sh", (*_TPU, "--zone"), "--zone needs a value"),
      ("slurm.sh", (*_SLURM, "--workdir=/w", "--time=long"), "written as"),
      ("gke.sh", (*_GKE, "--workdir=/w"), "must lie below /data"),
      ("gke.sh", (*_GKE, "more"), "unexpected more"),
  )
  def test_wrong_options_are_one_line(self, name, flags, message):
    done = self.start(name, *flags)
    self.assertEqual(done.returncode, 2)
    self.assertIn(message, done.stderr)
    self.assertLen(done.stderr.splitlines(), 1)
    self.assertFalse((self.folder / "calls").exists())

  def test_nothing_for_a_linter_to_say(self):
    files = [*_STARTERS.glob("*.sh"), *_STARTERS.glob("*.sbatch")]
    self.assertLen(files, 5)
    for path in files:
      subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck"):
      root = _STARTERS.parents[1]
      subprocess.run(["shellcheck", "-x", *files], check=True, cwd=root)


if __name__ == "__main__":
  absltest.main()
