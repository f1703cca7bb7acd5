"""Programs in the place of ssh, gcloud, sbatch, srun and of the interpreter; they write down their calls."""

import json
import os
import sys

RECORD = f"""#!{sys.executable}
import json, os, sys
name = os.path.basename(sys.argv[0])
call = dict(argv=sys.argv[1:], folder=os.getcwd(), environment=dict(os.environ))
if name == "sbatch":
    call["script"] = open(sys.argv[-1]).read()
with open(os.path.join({{folder!r}}, name + ".jsonl"), "a") as file:
    file.write(json.dumps(call) + "\\n")
"""

SSH = """
position = 1
while sys.argv[position].startswith("-"):
    position += 2 if sys.argv[position] == "-o" else 1
os.execv("/bin/sh", ["sh", "-c", " ".join(sys.argv[position + 1:])])
"""

GCLOUD = """
os.execv("/bin/sh", ["sh", "-c", sys.argv[sys.argv.index("--command") + 1]])
"""

SRUN = """
arguments = [word for word in sys.argv[1:] if word != "--label" and not word.startswith("--kill")]
os.execvp(arguments[0], arguments)
"""

BODIES = {"ssh": SSH, "gcloud": GCLOUD, "srun": SRUN, "sbatch": "", "interpreter": ""}


class StandIns:
    """A folder of programs to be put first on PATH, and what they were called with."""

    def __init__(self, folder):
        self.folder = folder
        for name, body in BODIES.items():
            self.write(name, body)

    def write(self, name, body):
        path = self.folder / name
        path.write_text(RECORD.format(folder=str(self.folder)) + body)
        path.chmod(0o755)

    @property
    def path(self):
        return f"{self.folder}{os.pathsep}{os.environ['PATH']}"

    def calls(self, name):
        path = self.folder / f"{name}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
