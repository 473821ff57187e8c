#!/usr/bin/busybox sh
# The first process of a machine: what an init would mount, then the scenario, then the end.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin HOME=/root
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
ln -s /proc/self/fd /dev/fd
for number in 0:stdin 1:stdout 2:stderr; do ln -s "/proc/self/fd/${number%:*}" "/dev/${number#*:}"; done
mount -t devpts devpts /dev/pts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
mount -t tracefs tracefs /sys/kernel/tracing 2>/dev/null
# Built into the kernels of some series. The last for its device, which udev makes elsewhere.
modprobe -q -a virtio_pci virtio_console virtio_blk tun
ip link set lo up
hostname vm
for port in /sys/class/virtio-ports/*; do
    if [ "$(cat "$port/name")" = steps ]; then steps=/dev/${port##*/}; fi
done
echo "init done at $(cut -d ' ' -f 1 /proc/uptime) s"
scenario='/opt/sg/sg-vm-guest "$1" $(cat /opt/sg/words); sync; poweroff -f'
if [ ! -e /opt/sg/systemd ]; then exec sh -c "$scenario" scenario "$steps"; fi
# The disk's systemd becomes the first process, when the scenario wants it to. What runs the scenario stays here.
mount -t ext4 /dev/vda /mnt
mkdir -p /mnt/usr/lib/modules
mount -o bind /usr/lib/modules /mnt/usr/lib/modules
mkfifo /run/boot
/usr/bin/unshare --mount --propagation private sh -c "$scenario" scenario "$steps" &
read -r _ </run/boot
cd /mnt || exit
mount -o move . /
exec chroot . /sbin/init </dev/console >/dev/console 2>&1
