"""In a mount namespace: hides this Python's shared library from programs that start from now on, runs a script.

    unshare --mount python without_libpython.py SCRATCH SCRIPT ARGUMENTS…

This process has its own already. SCRATCH: an empty folder for what the hiding takes.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import sysconfig
from pathlib import Path

scratch, script, *arguments = sys.argv[1:]
name = f"libpython{sysconfig.get_python_version()}.so.1.0"
built = Path(sysconfig.get_config_var("LIBDIR"))
folders = [built, built / (sysconfig.get_config_var("MULTIARCH") or ""), Path(sys.base_prefix, "lib")]
for number, folder in enumerate(dict.fromkeys(folders)):
    if (folder / name).exists():
        upper, work = Path(scratch, str(number), "upper"), Path(scratch, str(number), "work")
        upper.mkdir(parents=True)
        work.mkdir()
        options = f"lowerdir={folder},upperdir={upper},workdir={work}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(folder)], check=True)
        (folder / name).unlink()
sys.argv = [script, *arguments]
sys.path.insert(0, os.path.dirname(script))
runpy.run_path(script, run_name="__main__")
