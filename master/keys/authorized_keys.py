"""A public key on a host: is it there, install it, take it away; by its blob, whatever stands around it.

The shell script is POSIX, so that it runs where bash isn't; the new authorized_keys is written beside and renamed.
"""

from __future__ import annotations

import shlex

from master.core.terminal import one_line
from master.keys.key_pair import KeyPair
from master.ssh.route import SshError
from master.ssh.session import Session, last_words

# $1: check, install or remove; $2: the key's blob; $3: its whole line. Prints @@KEYS and one word, then what to know.
SCRIPT = r"""
umask 077
say() { printf '\n@@KEYS %s\n' "$*"; exit 0; }
fail() { printf '\n@@KEYS fault %s\n' "$*"; exit 1; }
cd || fail 'there is no home folder to go to'
file=.ssh/authorized_keys
[ ! -d "$file" ] || fail "$(pwd)/$file is a folder: move it away"
# A line is options, the type of a key, its blob, a comment: the blob is what comes after the type, and nothing else.
blob_of='function blob_of(line, n, words, count) {
  gsub(/\\\\"/, "", line); gsub(/"[^"]*"/, "", line); count = split(line, words, /[ \t]+/)
  for (n = 1; n < count; n++) if (words[n] ~ /^(ssh-[a-z0-9]|ecdsa-sha2-|sk-)/) return words[n + 1]
  return "" }'
there() { [ -f "$file" ] && awk -v blob="$1" "$blob_of"' /^[ \t]*#/ {next} blob_of($0) == blob {found = 1}
  END {exit !found}' "$file"; }
write() {  # standard input becomes the file
  target=$file
  [ ! -L "$file" ] || target=$(readlink -f "$file") || fail "$file is a link to nowhere"
  new=$target.$$.new
  if cat > "$new" 2>/dev/null && chmod 600 "$new" && mv -f "$new" "$target"; then return 0; fi
  rm -f "$new"
  fail "$(pwd)/$file cannot be written: is the disk full (df -h ~), or the home read-only?"
}
modes() {
  chmod 700 .ssh 2>/dev/null; chmod 600 "$file" 2>/dev/null
  if command -v restorecon >/dev/null 2>&1; then restorecon -R .ssh 2>/dev/null; fi
  [ -z "$(find . -prune -perm /022 2>/dev/null)" ] ||
    printf '\n@@KEYS open %s\n' "$(pwd) may be written by others, so that sshd refuses its keys: chmod go-w $(pwd)"
}
lock=.ssh/.lanspeed.lock
take_lock() {  # homes may be shared between hosts that are all visited at once
  n=0
  until mkdir "$lock" 2>/dev/null; do
    n=$((n + 1))
    if [ ! -d "$lock" ] || [ "$n" -gt 10 ]; then break; fi
    sleep 1
  done
  trap 'rmdir "$lock" 2>/dev/null' EXIT
}
case $1 in
  check) if there "$2"; then say was there; else say was not there; fi ;;
  install)
    mkdir -p .ssh 2>/dev/null || fail "$(pwd)/.ssh cannot be made: is the home read-only?"
    take_lock
    if there "$2"; then modes; say was there; fi
    {
      if [ -f "$file" ]; then cat "$file"; [ -z "$(tail -c 1 "$file")" ] || echo; fi
      printf '%s\n' "$3"
    } | write || exit 1
    there "$2" || fail "$(pwd)/$file was written and lacks the key"
    modes; say installed ;;
  remove)
    [ ! -d .ssh ] || take_lock
    there "$2" || say was not there
    awk -v blob="$2" "$blob_of"' /^[ \t]*#/ {print; next} blob_of($0) != blob {print}' "$file" |
      write || exit 1
    [ -s "$file" ] || { rm -f "$file"; rmdir "$lock" .ssh 2>/dev/null; }
    say removed ;;
esac
"""


def run_script(session: Session, deed: str, pair: KeyPair) -> str:
    """Run the script on a host; return its word; raise SshError for a fault."""
    words = shlex.join([deed, pair.blob, pair.public])
    done = session.run(f"exec sh -s -- {words}", SCRIPT.encode())
    marked = [line[7:].strip() for line in done.out.replace("\r", "").splitlines() if line.startswith("@@KEYS ")]
    host = str(session.node)
    if not marked:
        said = last_words(done.out, done.err)
        raise SshError(host, "key", f"the host's shell printed: {said}", f"ssh-copy-id -i {pair.path}.pub {host}")
    for line in marked:
        if line.startswith("fault "):
            raise SshError(host, "key", line.removeprefix("fault "))
    warnings = [line.removeprefix("open ") for line in marked[:-1] if line.startswith("open ")]
    return one_line("; ".join([marked[-1][:40], *(warning[:400] for warning in warnings)]))


def key_is_there(session: Session, pair: KeyPair) -> bool:
    """Return whether a host knows the key."""
    return run_script(session, "check", pair) == "was there"


def install_key(session: Session, pair: KeyPair) -> str:
    """Add the key; return 'installed' or 'was there', and a warning where the home is too open."""
    return run_script(session, "install", pair)


def remove_key(session: Session, pair: KeyPair) -> str:
    """Take the key away; return 'removed' or 'was not there'."""
    return run_script(session, "remove", pair)
