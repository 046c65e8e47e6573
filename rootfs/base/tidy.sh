# Removes what differs from one build to the next, or from one sandbox to the next.
set -eu
root=$1

# Identities: every sandbox must make or get its own. The host names the machine and its name server at boot.
rm -f "$root/etc/machine-id" "$root/var/lib/dbus/machine-id" "$root/etc/hostname" "$root/etc/resolv.conf"

# Python's compiled files carry their source's time, which is changed after this script; one that checks a hash never
# checks the time, so that no sandbox compiles the standard library again. A fixed seed gives the same bytes each time.
find "$root/usr" -name '*.pyc' -delete
chroot "$root" env PYTHONHASHSEED=0 sh -c \
    'python3 -m compileall -q -f --invalidation-mode unchecked-hash \
        /usr/lib/python3 /usr/lib/python3.* /usr/local/lib/python3.*/dist-packages'

# Backups, caches and logs.
rm -f "$root"/etc/passwd- "$root"/etc/group- "$root"/etc/shadow- "$root"/etc/gshadow- \
    "$root"/etc/subuid- "$root"/etc/subgid- "$root"/etc/.pwd.lock
rm -f "$root"/var/cache/debconf/*-old "$root"/var/lib/dpkg/*-old "$root"/var/cache/ldconfig/aux-cache
find "$root/var/log" -type f -delete
