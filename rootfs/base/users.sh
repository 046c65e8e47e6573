# The users of a sandbox: root, and `user`, who may become root without a password.
set -eu
root=$1

chroot "$root" useradd --create-home --uid 1000 --shell /bin/bash --comment "" user

printf 'user ALL=(ALL:ALL) NOPASSWD: ALL\n' >"$root/etc/sudoers.d/user"
chmod 0440 "$root/etc/sudoers.d/user"

# The agent's own program is mounted over this file when the sandbox starts. Not executable, so that where nothing is
# mounted the shell says so instead of running an empty script.
: >"$root/usr/local/bin/guestd"
chmod 0644 "$root/usr/local/bin/guestd"
