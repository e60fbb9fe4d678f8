#!/bin/sh
# Makes a fresh Debian machine ready for `cargo xtask test`, and adds the command trama-test that runs it in the folder $1.
set -eu
sources=$1
export DEBIAN_FRONTEND=noninteractive
apt-get -q update
# What xtask does not add by itself: a C compiler, a way to fetch rustup, and what the tests look at packets with.
apt-get -q -y install --no-install-recommends build-essential ca-certificates curl iproute2 nftables iptables kmod
# The kernel of the cloud images lacks nothing; modules that no test asks for by itself.
for module in ip_vs sctp nf_tables br_netfilter; do
    modprobe "$module" || echo "no module $module in kernel $(uname -r)"
done
if ! [ -x /root/.cargo/bin/cargo ]; then
    curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y --profile minimal
fi
cat >/usr/local/bin/trama-test <<END
#!/bin/sh
cd "$sources" && HOME=/root PATH=/root/.cargo/bin:\$PATH exec cargo xtask test "\$@"
END
chmod 0755 /usr/local/bin/trama-test
