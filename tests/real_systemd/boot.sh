#!/bin/bash
# Becomes PID 1 of its own namespaces: first hides every place of the host that systemd or its jobs write to,
# then is systemd. Arguments: a folder of the host to share (seen as /run/shared, its units/ are systemd's), the
# cgroups it gets ("unified", or "hybrid": memory in a hierarchy of version 1, the rest in one of version 2), and
# folders that must stay readable although a home or a temporary folder above them is hidden.
set -euo pipefail
shared=$1 cgroups=$2
shift 2

mount --make-rprivate /
# What is about to be covered is set aside first, in a place where nothing else is.
mount -t tmpfs -o mode=0755 tmpfs /mnt
mkdir /mnt/shared
mount --bind "$shared" /mnt/shared
count=0
for folder in "$@"; do
  count=$((count + 1))
  mkdir "/mnt/$count"
  mount --rbind "$folder" "/mnt/$count"
done

# systemd's tmpfiles job empties these: it must find ours.
for folder in /run /tmp /var/tmp; do mount -t tmpfs -o mode=1777 tmpfs "$folder"; done
chmod 0755 /run
# The users, units, rules and state of the host are seen; what is written is gone with the namespace.
for folder in /etc /var; do
  mkdir -p "/mnt/upper$folder" "/mnt/work$folder"
  options=lowerdir=$folder,upperdir=/mnt/upper$folder,workdir=/mnt/work$folder
  mount -t overlay -o "$options" overlay "$folder"
done
mount -t tmpfs -o mode=1777 tmpfs /var/tmp
for folder in /etc/systemd/system /lib/systemd/system-generators /root; do
  mount -t tmpfs -o mode=0755 tmpfs "$folder"
done
count=0
for folder in "$@"; do
  count=$((count + 1))
  mkdir -p "$folder"
  mount --rbind "/mnt/$count" "$folder"
done
mkdir /run/shared
mount --bind /mnt/shared /run/shared

# Each hierarchy is rooted at this namespace's own cgroup; the kernel's settings are not ours to change.
umount -R /sys/fs/cgroup
case $cgroups in
unified) mount -t cgroup2 cgroup2 /sys/fs/cgroup ;;
hybrid)
  mount -t tmpfs -o mode=0755 tmpfs /sys/fs/cgroup
  mkdir /sys/fs/cgroup/{unified,systemd,memory}
  mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified
  mount -t cgroup -o none,name=systemd cgroup /sys/fs/cgroup/systemd
  mount -t cgroup -o memory cgroup /sys/fs/cgroup/memory
  # systemd mounts whatever controller it finds here: of the others it would get the host's own roots.
  grep -E '^(#|memory\b)' /proc/cgroups >/mnt/controllers
  mount --bind /mnt/controllers /proc/cgroups
  ;;
esac
mount --bind /proc/sys /proc/sys
mount -o remount,ro,bind /proc/sys

mkdir -p /run/systemd/system
cp -r /run/shared/units/. /run/systemd/system/
hostname stepguard-test
# Credentials are mounted from within a namespace of their own, and seen only if mounts are handed on.
mount --make-rshared /
cd /
exec env -i container=stepguard-test LANG=C.UTF-8 \
  PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
  /lib/systemd/systemd --unit=stepguard-test.target --log-target=null --show-status=no
