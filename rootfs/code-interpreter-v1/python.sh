# What the wheels need besides being there.
set -eu
root=$1

# A sandbox is thrown away as a whole: what `pip install` does to its system's Python hurts nobody.
rm -f "$root"/usr/lib/python3.*/EXTERNALLY-MANAGED

# The largest of the tests that packages bring. Not all tests: numpy.testing needs something of numpy's.
rm -r "$root"/usr/local/lib/python3.*/dist-packages/matplotlib/tests "$root"/usr/local/lib/python3.*/dist-packages/pandas/tests

# matplotlib looks through all fonts at its first import by each user, which takes an emulated machine many seconds.
# A fixed seed gives the list the same order each time.
chroot --userspec=1000:1000 "$root" env -i HOME=/home/user PYTHONHASHSEED=0 PYTHONDONTWRITEBYTECODE=1 \
    /usr/bin/python3 -c 'import matplotlib.font_manager'
