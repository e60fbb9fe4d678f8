#!/bin/busybox sh
# The guest's first process. Makes this machine's root, read-only, and a file system in memory into one root, and goes there.
# `trama.job` on the kernel's command line is the folder of the work to be done; `trama.modules` the folder of the kernel's modules.
B=/bin/busybox
fail() {
    echo "trama-vm: $1"
    $B poweroff -f
}

if [ "$1" != in-root ]; then
    $B mount -t proc proc /proc
    $B mount -t devtmpfs dev /dev
    for module in /modules/*; do
        $B insmod "$module" || fail "cannot load $module"
    done
    $B mount -t virtiofs -o ro root /shared || fail "cannot mount the shared root"
    $B mount -t tmpfs -o size=50%,mode=0755 writes /writes
    $B mkdir /writes/upper /writes/work
    $B mount -t overlay -o lowerdir=/shared,upperdir=/writes/upper,workdir=/writes/work root /new || fail "cannot lay memory over the root"
    for kind in proc:proc sysfs:sys devtmpfs:dev tmpfs:run; do
        $B mount -t "${kind%%:*}" "${kind%%:*}" "/new/${kind##*:}" || fail "cannot mount /${kind##*:}"
    done
    $B umount /proc
    $B umount /dev
    $B mkdir -p /new/run/trama-vm
    $B cp /bin/busybox /init /new/run/trama-vm/
    exec $B switch_root /new /run/trama-vm/busybox sh /run/trama-vm/init in-root
fi

B=/run/trama-vm/busybox
argument() {
    $B sed -n "s/.*\\<trama\\.$1=\\([^ ]*\\).*/\\1/p" /proc/cmdline
}

# The device of a named port to the machine outside.
port() {
    for folder in /sys/class/virtio-ports/*; do
        [ "$($B cat "$folder/name")" = "$1" ] && echo "/dev/${folder##*/}"
    done
}

$B mkdir -p /dev/pts /dev/shm
$B mount -t devpts -o mode=0620,ptmxmode=0666 devpts /dev/pts
$B mount -t tmpfs shm /dev/shm
$B ln -sf /proc/self/fd /dev/fd
$B ln -sf /proc/self/fd/0 /dev/stdin
$B ln -sf /proc/self/fd/1 /dev/stdout
$B ln -sf /proc/self/fd/2 /dev/stderr
$B mount -t cgroup2 -o nsdelegate cgroup2 /sys/fs/cgroup || fail "cannot mount cgroup2"
$B mount -t bpf -o mode=0700 bpf /sys/fs/bpf || fail "cannot mount bpffs"
$B mount -t tracefs tracefs /sys/kernel/tracing
$B mount -t debugfs debugfs /sys/kernel/debug
$B mkdir -p /run/lock
modules=$(argument modules)
$B mkdir -p "/lib/modules/${modules##*/}"
$B mount -o bind "$modules" "/lib/modules/${modules##*/}" || fail "cannot bind the kernel's modules"
$B hostname trama-vm
$B ip link set lo up
ulimit -n 65536
ulimit -l unlimited

job=$(argument job)
$B sh "$job/command" </dev/null >"$(port stdout)" 2>"$(port stderr)"
echo $? >"$(port status)"
$B poweroff -f
