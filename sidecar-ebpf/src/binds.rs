//! The bind guard, apart from the counters' object: two programs on a control group that
//! refuse a bind, or move sshd's, as [`sidecar_ebpf::bind::judge`] says.

#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod object;

#[cfg(target_arch = "bpf")]
mod guard {
    use core::ffi::c_void;

    use aya_ebpf::EbpfContext as _;
    use aya_ebpf::helpers::generated::{
        bpf_get_current_cgroup_id, bpf_get_netns_cookie, bpf_ktime_get_boot_ns, bpf_probe_read_kernel,
    };
    use aya_ebpf::macros::{cgroup_sock_addr, map};
    use aya_ebpf::maps::lpm_trie::Key;
    use aya_ebpf::maps::{Array, LpmTrie, LruHashMap, PerCpuArray, RingBuf};
    use aya_ebpf::programs::SockAddrContext;
    use sidecar_ebpf::bind::{
        Bind, Guard, Judgement, KINDS_WORDS, PLACE_KEY_HEAD_BITS, PLACES_MAX, PlaceKey, REFUSALS_MAX,
        RING_BYTES, Refusal, RefusalKey, TCP, Tables, UDP, Wake, judge, kind, kind_place, mapped, mode,
        outcome,
    };

    #[map]
    pub static GUARD: Array<Guard> = Array::pinned(1, 0);
    #[map]
    pub static KINDS: Array<u64> = Array::pinned(KINDS_WORDS, 0);
    #[map]
    pub static PLACES: LpmTrie<PlaceKey, u8> = LpmTrie::pinned(PLACES_MAX, 0);
    #[map]
    pub static REFUSALS: LruHashMap<RefusalKey, Refusal> = LruHashMap::pinned(REFUSALS_MAX, 0);
    #[map]
    pub static TALLY: PerCpuArray<u64> = PerCpuArray::pinned(outcome::COUNT, 0);
    #[map]
    pub static WAKES: RingBuf = RingBuf::pinned(RING_BYTES, 0);
    /// Which object the pinned programs come from; only user space reads and writes it.
    #[map]
    pub static BUILD: Array<u64> = Array::pinned(1, 0);

    const ALLOW: i32 = 1;
    /// bind(2) fails with EPERM.
    const REFUSE: i32 = 0;

    #[cgroup_sock_addr(bind4)]
    pub fn bind4(ctx: SockAddrContext) -> i32 {
        let Some(guard) = on_duty(&ctx) else { return ALLOW };
        // SAFETY: a field of the context that bind programs may read, in network order.
        let address = unsafe { (&raw const (*ctx.sock_addr).user_ip4).read_volatile() };
        let bind = asked(&ctx, mapped(address.to_ne_bytes()), false);
        decide(&ctx, guard, &bind, |to| {
            let to = u32::from_ne_bytes([to[12], to[13], to[14], to[15]]);
            // SAFETY: bind programs may write this field.
            unsafe { (&raw mut (*ctx.sock_addr).user_ip4).write_volatile(to) };
        })
    }

    #[cgroup_sock_addr(bind6)]
    pub fn bind6(ctx: SockAddrContext) -> i32 {
        let Some(guard) = on_duty(&ctx) else { return ALLOW };
        let mut address = [0u8; 16];
        for word in 0..4 {
            // SAFETY: as above.
            let four = unsafe { (&raw const (*ctx.sock_addr).user_ip6[word]).read_volatile() }.to_ne_bytes();
            address[word * 4] = four[0];
            address[word * 4 + 1] = four[1];
            address[word * 4 + 2] = four[2];
            address[word * 4 + 3] = four[3];
        }
        let bind = asked(&ctx, address, true);
        decide(&ctx, guard, &bind, |to| {
            for word in 0..4 {
                let at = word * 4;
                let four = u32::from_ne_bytes([to[at], to[at + 1], to[at + 2], to[at + 3]]);
                // SAFETY: as above.
                unsafe { (&raw mut (*ctx.sock_addr).user_ip6[word]).write_volatile(four) };
            }
        })
    }

    /// The guard, where it has anything to say about this socket.
    #[inline(always)]
    fn on_duty(ctx: &SockAddrContext) -> Option<&'static Guard> {
        let guard = GUARD.get(0)?;
        if guard.mode == mode::OFF || guard.lifted != 0 {
            return None;
        }
        // SAFETY: the context of this program. The namespace is the socket's, whoever holds it.
        (unsafe { bpf_get_netns_cookie(ctx.as_ptr()) } == guard.netns).then_some(guard)
    }

    #[inline(always)]
    fn asked(ctx: &SockAddrContext, address: [u8; 16], ipv6: bool) -> Bind {
        const SOCK_STREAM: u32 = 1;
        // SAFETY: fields of the context that bind programs may read.
        let (port, kind) = unsafe {
            (
                (&raw const (*ctx.sock_addr).user_port).read_volatile(),
                (&raw const (*ctx.sock_addr).type_).read_volatile(),
            )
        };
        // SAFETY: as above; the verifier knows it as a socket, which is never null here.
        let sk = unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk };
        // SAFETY: a field that programs may read.
        let device = unsafe { (&raw const (*sk).bound_dev_if).read_volatile() };
        Bind {
            // MPTCP is a stream, UDP-Lite a datagram.
            proto: if kind == SOCK_STREAM { TCP } else { UDP },
            port: u16::from_be(port as u16),
            address,
            ipv6,
            dual: ipv6 && takes_both(sk.cast()),
            device,
        }
    }

    #[inline(always)]
    fn is_trial(ctx: &SockAddrContext, guard: &Guard) -> bool {
        // SAFETY: as in `asked`.
        let mark = unsafe { (&raw const (*(*ctx.sock_addr).__bindgen_anon_1.sk).mark).read_volatile() };
        guard.prover != 0 && mark == guard.prover
    }

    /// Whether an IPv6 socket takes IPv4 as well. No helper tells; `struct sock` begins with
    /// sock_common, whose first fields are where they are since Linux 4.7. Anything that does
    /// not look like it counts as IPv6 only.
    #[inline(always)]
    fn takes_both(sk: *const c_void) -> bool {
        const FAMILY_AT: usize = 16;
        const FLAGS_AT: usize = 19;
        const IPV6_ONLY: u8 = 1 << 5;
        const AF_INET6: u16 = 10;
        let mut head = [0u8; 20];
        // SAFETY: the kernel writes 20 bytes to `head` or fails, wherever `sk` points.
        let result = unsafe { bpf_probe_read_kernel(head.as_mut_ptr().cast(), head.len() as u32, sk) };
        result == 0
            && u16::from_ne_bytes([head[FAMILY_AT], head[FAMILY_AT + 1]]) == AF_INET6
            && head[FLAGS_AT] & IPV6_ONLY == 0
    }

    struct Maps;

    impl Tables for Maps {
        #[inline(always)]
        fn kind(&self, proto: u8, port: u16) -> u8 {
            let (word, shift) = kind_place(proto, port);
            KINDS.get(word).map_or(kind::ANYWHERE, |word| (*word >> shift) as u8 & 3)
        }

        #[inline(always)]
        fn holds(&self, list: u32, address: &[u8; 16]) -> bool {
            let key = PlaceKey { list, address: *address };
            PLACES.get(Key::new(PLACE_KEY_HEAD_BITS + 128, key)).is_some()
        }
    }

    #[inline(always)]
    fn decide(ctx: &SockAddrContext, guard: &Guard, bind: &Bind, write: impl FnOnce(&[u8; 16])) -> i32 {
        let judgement = judge(guard, &Maps, bind);
        let (what, result) = match judgement {
            Judgement::Allow => return ALLOW,
            // Of a daemon's own trial the verdict is all that tells; nothing comes of its socket.
            Judgement::Refuse if is_trial(ctx, guard) => return REFUSE,
            _ if guard.mode != mode::ENFORCE => (outcome::AUDITED, ALLOW),
            Judgement::Refuse => (outcome::REFUSED, REFUSE),
            Judgement::Move(to) => {
                write(&to);
                (outcome::MOVED, ALLOW)
            }
        };
        if is_trial(ctx, guard) {
            return result;
        }
        if let Some(count) = TALLY.get_ptr_mut(what as u32) {
            // SAFETY: a value of this map. It belongs to this CPU, which we keep until the end.
            unsafe { *count += 1 };
        }
        if what != outcome::MOVED {
            record(ctx, bind, what);
        }
        result
    }

    #[inline(always)]
    fn record(ctx: &SockAddrContext, bind: &Bind, outcome: u8) {
        let key = RefusalKey {
            address: bind.address,
            comm: ctx.command().unwrap_or_default(),
            port: bind.port,
            proto: bind.proto,
            outcome,
        };
        // SAFETY: neither takes an argument.
        let (now, cgroup) = unsafe { (bpf_ktime_get_boot_ns(), bpf_get_current_cgroup_id()) };
        let pid = ctx.tgid();
        if let Some(known) = REFUSALS.get_ptr_mut(&key) {
            // SAFETY: a value of this map. Two CPUs may meet here: then one of the two is not
            // counted here. TALLY has them all.
            unsafe {
                (*known).count += 1;
                (*known).last_ns = now;
                (*known).cgroup = cgroup;
                (*known).pid = pid;
            }
        } else {
            let first = Refusal { count: 1, first_ns: now, last_ns: now, cgroup, pid, uid: ctx.uid() };
            let _ = REFUSALS.insert(&key, &first, 0);
        }
        if let Some(mut entry) = WAKES.reserve::<Wake>(0) {
            entry.write(Wake { key, pid, cgroup });
            entry.submit(0);
        }
    }
}

/// For the host there is no program to build.
#[cfg(not(target_arch = "bpf"))]
fn main() {}
