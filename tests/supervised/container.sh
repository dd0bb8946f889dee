#!/bin/bash
# Becomes process 1 of a container as an engine makes one: its own processes, mounts and host name, a /dev
# without the kernel's log, a /run without systemd, and one volume of the host at /run/volume.
# Arguments: the volume's folder on the host, then the command.
set -euo pipefail
volume=$1
shift

mount --make-rprivate /
mount -t tmpfs -o mode=0755 tmpfs /mnt
mkdir /mnt/volume /mnt/dev
mount --bind "$volume" /mnt/volume
for device in null zero full random urandom; do
  touch "/mnt/dev/$device"
  mount --bind "/dev/$device" "/mnt/dev/$device"
done
mkdir -m 1777 /mnt/dev/shm
ln -s /proc/self/fd /mnt/dev/fd
mount --rbind /mnt/dev /dev

mount -t tmpfs -o mode=0755 tmpfs /run
mkdir /run/volume
mount --bind /mnt/volume /run/volume
hostname container
cd /
exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 OMP_NUM_THREADS=1 "$@"
