"""Keep what ptxas says of every CUDA kernel, and refuse kernels it could not compile well.

``compile -- nvcc ...`` is the launcher of CMake's CUDA compiler: it stores the messages beside the
object file and fails on register spills and on serialised wgmma. ``collect`` makes one table of
them, build/ptxas.json.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
SERIALISED = re.compile(r"\(C75\d\d\)")


def parse(log: str) -> list[dict]:
    """Rows of the table for one compiler log, in the order of compilation."""
    kernels: dict[str, dict] = {}
    current: dict = {}
    for line in log.splitlines():
        if match := ENTRY.search(line):
            current = {"symbol": match[1], "arch": match[2], "warnings": []}
            kernels[match[1]] = current
        if match := SPILLS.search(line):
            current["stack"] = int(match[1])
            current["spills"] = int(match[2]) + int(match[3])
        if match := USED.search(line):
            shared = SHARED.search(line)
            current["registers"] = int(match[1])
            current["smem"] = int(shared[1]) if shared else 0
    for line in log.splitlines():
        if SERIALISED.search(line):
            symbol = line.rpartition("function '")[2].rstrip("'. ")
            row = kernels.setdefault(symbol, {"symbol": symbol, "warnings": []})
            row["warnings"].append(line.strip())
    return list(kernels.values())


def demangle(symbols: list[str]) -> list[str]:
    """Readable names, or the symbols themselves where c++filt is not installed."""
    try:
        text = subprocess.run(
            ["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return symbols
    noise = re.compile(r"\(anonymous namespace\)::|^void |\(.*\)$")
    return [noise.sub("", name) for name in text.splitlines()]


def complaints(kernels: list[dict]) -> list[str]:
    """What a release kernel may not have: spills and serialised wgmma."""
    found = []
    for kernel, name in zip(kernels, demangle([k["symbol"] for k in kernels]), strict=True):
        if kernel.get("spills"):
            found.append(f"{name}: {kernel['spills']} bytes of register spills")
        found += [f"{name}: {warning}" for warning in kernel["warnings"]]
    return found


def compile_source(command: list[str]) -> int:
    """Run the compiler and keep its messages in <object>.ptxas.log."""
    result = subprocess.run(
        command, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True, check=False
    )
    target = Path(command[command.index("-o") + 1])
    target.with_name(target.name + ".ptxas.log").write_text(result.stdout)
    shown = [line for line in result.stdout.splitlines(True) if not line.startswith("ptxas info")]
    found = complaints(parse(result.stdout))
    sys.stdout.write("".join(line for line in shown if "bytes stack frame" not in line))
    sys.stdout.writelines(f"ptxas: {text}\n" for text in found)
    if found and result.returncode == 0:
        target.unlink(missing_ok=True)
        return 1
    return result.returncode


def collect(objects: list[Path], output: Path) -> None:
    """Write the table of all kernels in the objects."""
    table = []
    for target in objects:
        log = target.with_name(target.name + ".ptxas.log")
        kernels = parse(log.read_text())
        for kernel, name in zip(kernels, demangle([k["symbol"] for k in kernels]), strict=True):
            table.append({"kernel": name, "source": target.name.removesuffix(".o"), **kernel})
    table.sort(key=lambda row: (row["source"], row["kernel"]))
    output.write_text(json.dumps(table, indent=1) + "\n")


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    run = actions.add_parser("compile")
    run.add_argument("command", nargs=argparse.REMAINDER)
    gather = actions.add_parser("collect")
    gather.add_argument("--output", type=Path, required=True)
    gather.add_argument("objects", nargs="*", type=Path)
    arguments = parser.parse_args()
    if arguments.action == "compile":
        return compile_source([part for part in arguments.command if part != "--"])
    collect(arguments.objects, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
