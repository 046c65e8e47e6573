# Fetches the kernel of the image's own release, whatever this machine runs: $1 is the tree, whose package lists are
# still there; KERNEL_PACKAGE is a kernel or a meta package that depends on one. The tree does not keep the kernel: it
# is copied out and removed.
set -eu
root=$1
export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"

packages=$KERNEL_PACKAGE
while :; do
    # The kernels that these depend on; none, if they are kernels themselves.
    # shellcheck disable=SC2086
    next=$(apt-cache depends --no-recommends --no-suggests $packages | sed -n 's/^ *Depends: \(linux-image-[^ ]*\)$/\1/p')
    [ -n "$next" ] || break
    packages=$next
done

mkdir "$root/guestd-build"
cd "$root/guestd-build"
# shellcheck disable=SC2086
apt-get download -q -o APT::Sandbox::User=root $packages
mv linux-image-*.deb kernel.deb
dpkg-query --admindir="$root/var/lib/dpkg" --show --showformat '${Package}=${Version}\n' | LC_ALL=C sort >packages
