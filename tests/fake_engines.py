"""Programs that stand in for llama.cpp's and vLLM's: they note what they are asked, and answer."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path

# What `llama-bench -o json` and `llama-batched-bench --output-format jsonl` printed (version
# 0.6.0-dev), the figures replaced: seconds are tokens / 100, of a model called slow twice that.
_HEAD = """#!{python}
import json, os, sys, time
arguments = sys.argv[1:]
if arguments == ["--version"]:
    print("version: 0.6.0-dev (build 0, commit unknown)", file=sys.stderr)
    sys.exit(0)
with open({notes!r}, "a") as notes:
    notes.write(json.dumps([os.path.basename(sys.argv[0]), *arguments]) + "\\n")
def option(name):
    return arguments[arguments.index(name) + 1]
model = option("-m")
if "dying" in model:
    print("warming up", file=sys.stderr)
    print("llama_bench: error: failed to load model '" + model + "'", file=sys.stderr)
    sys.exit(1)
if "mumbling" in model:
    print("| model | size |")
    sys.exit(0)
if "big" in model:
    held = bytearray(100_000_000)
    time.sleep(0.4)
slow = 2 if "slow" in model else 1
"""
_SINGLE = """
prompt, new, depth = int(option("-p")), int(option("-n")), 0
if "-d" in arguments:
    depth = int(option("-d"))
ns = int((prompt + new) * 1e7 * slow)
print(json.dumps([{{"build_commit": "unknown", "build_number": 0, "cpu_info": "AMD EPYC",
    "backends": "CPU", "model_filename": model, "model_type": "llama 256M all F32",
    "n_batch": 2048, "n_threads": int(option("-t")), "n_prompt": prompt, "n_gen": new,
    "n_depth": depth, "avg_ns": ns, "stddev_ns": 0, "avg_ts": (prompt + new) * 1e9 / ns,
    "samples_ns": [ns], "samples_ts": [(prompt + new) * 1e9 / ns]}}], indent=2))
"""
_BATCHED = """
pp, tg, pl = (int(option(name)) for name in ("-npp", "-ntg", "-npl"))
print()
print(json.dumps({{"n_kv_max": int(option("-c")), "n_batch": 2048, "n_ubatch": 512, "pp": pp,
    "tg": tg, "pl": pl, "n_kv": pl * (pp + tg), "t_pp": pp * pl / 100 * slow, "speed_pp": 100.0,
    "t_tg": tg / 100 * slow, "speed_tg": 100.0 * pl}}))
print()
"""
# The parts of `vllm serve` that are asked: /health, and a stream of /v1/completions.
_VLLM = """#!{python}
import http.server, json, os, sys, time
arguments = sys.argv[1:]
if arguments == ["--version"]:
    print("INFO something else first")
    print("vllm 0.32.0")
    sys.exit(0)
def option(name):
    return arguments[arguments.index(name) + 1]
noted = {{k: v for k, v in os.environ.items() if k.startswith(("VLLM", "HF_HUB_OFF"))}}
with open({notes!r}, "a") as notes:
    notes.write(json.dumps([arguments, noted]) + "\\n")
name = option("--served-model-name")
if "dying" in arguments[1]:
    print("INFO starting", file=sys.stderr)
    print("ValueError: Free memory is less than what was asked for.", file=sys.stderr)
    print("RuntimeError: Engine core initialization failed. See root cause above.", file=sys.stderr)
    sys.exit(1)
class Handler(http.server.BaseHTTPRequestHandler):
    disable_nagle_algorithm = True
    def log_message(self, *_):
        pass
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with open({notes!r}, "a") as notes:
            notes.write(json.dumps([name, body]) + "\\n")
        if body["model"] != name or "refusing" in name:
            self.send_response(400)
            self.end_headers()
            said = {{"error": {{"message": "The prompt is not to be had.", "code": 400}}}}
            self.wfile.write(json.dumps(said).encode())
            return
        self.send_response(200)
        self.end_headers()
        short = 1 if "short" in name else 0
        for step in range(body["max_tokens"] - short):
            time.sleep(0.03 if step == 0 else 0.01)
            for index in range(len(body["prompt"])):
                choice = {{"index": index, "text": "", "token_ids": [7]}}
                event = {{"id": "cmpl-1", "object": "text_completion", "choices": [choice]}}
                self.wfile.write(b"data: " + json.dumps(event).encode() + b"\\n\\n")
        self.wfile.write(b"data: [DONE]\\n\\n")
http.server.ThreadingHTTPServer((option("--host"), int(option("--port"))), Handler).serve_forever()
"""


def llama_cpp(folder: Path) -> Path:
    """A directory with ``llama-bench`` and ``llama-batched-bench``; they write to ``notes``."""
    _program(folder / "llama-bench", _HEAD + _SINGLE)
    _program(folder / "llama-batched-bench", _HEAD + _BATCHED)
    return folder


def vllm(folder: Path) -> Path:
    """A program ``vllm``."""
    return _program(folder / "vllm", _VLLM)


def notes(folder: Path) -> list:
    """What the programs of a directory were asked, in order."""
    return [json.loads(line) for line in (folder / "notes").read_text().splitlines()]


def _program(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    # -S: no site packages, which would take longer than all else
    file.write_text(text.format(python=f"{sys.executable} -S", notes=str(file.parent / "notes")))
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return file
