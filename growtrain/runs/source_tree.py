"""The commit of the source tree that runs."""

import contextlib
import functools
import os
import subprocess
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any


@functools.cache
def git_state() -> Mapping[str, Any]:
    """`git_commit` of growtrain's own source tree, and `git_modified`, whether its tracked files differ from that, at the first call.

    Both are None for a package that is installed, wherever that is, or copied into another tree.
    """
    root = Path(__file__).resolve().parents[2]
    # Named, because git would look for a repository above as well, and a hook's environment may point it to another.
    git = ["git", "--no-optional-locks", f"--git-dir={root / '.git'}", f"--work-tree={root}"]
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def says(*words: str) -> str:
        done = subprocess.run([*git, *words], capture_output=True, text=True, timeout=10, check=True, env=own, cwd=root)
        return done.stdout.strip()

    state: dict[str, Any] = {"git_commit": None, "git_modified": None}
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError):
        if tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["name"] == "growtrain":
            state["git_commit"] = says("rev-parse", "--verify", "HEAD")
            state["git_modified"] = bool(says("status", "--porcelain", "--untracked-files=no"))
    return state
