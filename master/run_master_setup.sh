#!/usr/bin/env bash
# From nodes to launch commands in one go: makes .venv if need be, asks the nodes for their GPUs, shows the hostfile,
# prints the commands that train on it. All arguments go to generate_hostfile.py.
#
#     master/run_master_setup.sh --nodes gpu1 gpu2 --ssh-user me --ssh-key ~/.ssh/id_rsa
#     master/run_master_setup.sh --yes --nodes gpu1 gpu2      installs without asking

set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd) || exit 1
root=${here%/*}
yes=''
words=()
for word in "$@"; do
  if [[ $word == --yes ]]; then yes=1; else words+=("$word"); fi
done

find_python() { # a Python that has paramiko: the environment in use, .venv, the system's
  local python
  for python in "${VIRTUAL_ENV:-}/bin/python" "$root/.venv/bin/python" python3; do
    if "$python" -c 'import paramiko' 2>/dev/null; then
      printf '%s\n' "$python"
      return 0
    fi
  done
  return 1
}

may_install() {
  [[ -z $yes ]] || return 0
  if [[ ! -t 0 ]]; then
    echo "run_master_setup.sh: paramiko is missing, and no terminal to ask on: make -C $root install, or --yes" >&2
    return 1
  fi
  local answer
  read -rp "paramiko is missing. Install everything into $root/.venv (about 2 GB)? [yes/no] " answer
  [[ $answer == y || $answer == yes ]]
}

if ! python=$(find_python); then
  may_install || exit 1
  make -C "$root" --no-print-directory install || exit 1
  python=$(find_python) || { echo "run_master_setup.sh: paramiko is still missing in $root/.venv" >&2 && exit 1; }
fi

for old in "$here/generate_hostfile.sh" "$PWD/generate_hostfile.sh"; do
  if grep -qs detect_gpus "$old"; then # the old one; another program of that name stays
    rm -- "$old" && echo "removed $old: generate_hostfile.py does its work"
  fi
done

output=hostfile.txt
for ((n = 0; n < ${#words[@]}; n++)); do
  case ${words[n]} in
    --output) output=${words[n + 1]:-$output} ;;
    --output=*) output=${words[n]#*=} ;;
    -h | --help | --json) exec "$python" "$here/generate_hostfile.py" "${words[@]}" ;;
  esac
done
"$python" "$here/generate_hostfile.py" "${words[@]}"
code=$?
((code != 2)) && [[ -f $output ]] || exit "$code"
echo
"$python" "$here/show_launch.py" --hostfile "$output" || exit 1
exit "$code"
