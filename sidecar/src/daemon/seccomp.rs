//! Which system calls the daemon and its server may make.
//!
//! The daemon's filter is a list of what is refused. It is inherited by all that the daemon
//! runs: nft, sshd -T, a shell, itself. What those need changes with each version of theirs
//! and of libc, and a repair that fails for a call that nobody thought of opens the host. So
//! it takes away what none of them has any business with: ways to other processes, kernels,
//! modules, mounts, namespaces, and the parts of the kernel that are most often broken into.
//!
//! The server's is a list of what is allowed, and a short one: it moves bytes between sockets
//! that it was given. A call outside it fails; it doesn't kill, since a scrape that fails for
//! a new libc's sake should be the worst that happens.

use std::collections::BTreeMap;

use anyhow::Context as _;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

/// What neither the daemon nor its children may do.
const REFUSED: &[libc::c_long] = &[
    // Other processes' memory and descriptors. CAP_SYS_PTRACE is for reading /proc alone.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    // Another kernel, or more of this one.
    libc::SYS_kexec_load,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_reboot,
    // Mounts: bpffs is mounted before the filter.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    // Namespaces: a new user namespace has all capabilities that were dropped.
    libc::SYS_unshare,
    libc::SYS_setns,
    // The machine's settings.
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_syslog,
    libc::SYS_vhangup,
    libc::SYS_nfsservctl,
    // Wide, seldom needed, often broken.
    libc::SYS_add_key,
    libc::SYS_keyctl,
    libc::SYS_request_key,
    libc::SYS_userfaultfd,
    libc::SYS_perf_event_open,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_fanotify_init,
    libc::SYS_open_by_handle_at,
    libc::SYS_lookup_dcookie,
    libc::SYS_personality,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_kexec_file_load,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_iopl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ioperm,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_modify_ldt,
];

/// What the daemon and its children talk over: nft and wg over netlink, systemd over unix
/// sockets, probes over packet ones.
const FAMILIES: [libc::c_int; 5] =
    [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK, libc::AF_PACKET];

/// Whoever clones into a namespace of its own.
const NAMESPACES: [libc::c_int; 7] = [
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWNET,
    libc::CLONE_NEWNS,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWCGROUP,
];

/// Puts words into the terminal that the daemon was started from.
#[allow(clippy::unnecessary_cast)]
const TERMINAL_INPUT: [u64; 2] = [libc::TIOCSTI as u64, libc::TIOCLINUX as u64];

/// std's way of making a socket nonblocking. Requests are of another width in musl.
#[allow(clippy::unnecessary_cast)]
const NONBLOCKING: u64 = libc::FIONBIO as u64;
/// libc's resolver asks how much of an answer is there.
#[allow(clippy::unnecessary_cast)]
const PENDING: u64 = libc::FIONREAD as u64;

/// What the server may do, whatever the arguments.
const SERVED: &[libc::c_long] = &[
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_accept4,
    libc::SYS_shutdown,
    libc::SYS_close,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_futex,
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_getrandom,
    libc::SYS_sched_yield,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_exit,
    libc::SYS_exit_group,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
];

/// What the process that sends may do besides: resolve names, whose libraries it may load, and
/// connect.
const SENT: &[libc::c_long] = &[
    libc::SYS_openat,
    libc::SYS_newfstatat,
    libc::SYS_fstat,
    libc::SYS_statx,
    libc::SYS_faccessat,
    libc::SYS_readlinkat,
    libc::SYS_lseek,
    libc::SYS_pread64,
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_sendmmsg,
    libc::SYS_recvmmsg,
    libc::SYS_setsockopt,
    libc::SYS_ppoll,
    libc::SYS_uname,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_prctl,
    libc::SYS_prlimit64,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sched_getaffinity,
    libc::SYS_rt_sigaction,
    libc::SYS_gettimeofday,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_open,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_access,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_stat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_readlink,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_time,
];

/// Of whoever sends: routes are asked for before a name's addresses are put in order, and a
/// host's resolver may be behind a unix socket.
const SENDERS_FAMILIES: [libc::c_int; 4] = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];

/// Takes [`REFUSED`] from this thread and all that it starts from now on.
pub(super) fn confine_daemon() -> anyhow::Result<()> {
    apply(&daemon_filters()?)
}

/// Leaves [`SERVED`] to this thread, and little more.
pub(super) fn confine_server() -> anyhow::Result<()> {
    apply(&[server_filter()?])
}

/// Leaves [`SERVED`] and [`SENT`] to this thread and those that it starts.
pub(super) fn confine_sender() -> anyhow::Result<()> {
    apply(&[no_clone3()?, sender_filter()?])
}

fn apply(filters: &[BpfProgram]) -> anyhow::Result<()> {
    for filter in filters {
        seccompiler::apply_filter(filter).context("install a seccomp filter")?;
    }
    Ok(())
}

fn daemon_filters() -> anyhow::Result<[BpfProgram; 2]> {
    let mut rules: Rules = REFUSED.iter().map(|call| (*call, Vec::new())).collect();
    let other_family = FAMILIES.iter().map(|family| condition(0, SeccompCmpOp::Ne, *family as u64));
    rules.insert(libc::SYS_socket, vec![rule(other_family.collect())?]);
    let new = |flag: &libc::c_int| {
        rule(
            vec![condition(0, SeccompCmpOp::MaskedEq(*flag as u64), *flag as u64)?]
                .into_iter()
                .map(Ok)
                .collect(),
        )
    };
    rules.insert(libc::SYS_clone, NAMESPACES.iter().map(new).collect::<Result<_, _>>()?);
    let typing = |request: &u64| rule(vec![condition(1, SeccompCmpOp::Eq, *request)]);
    rules.insert(libc::SYS_ioctl, TERMINAL_INPUT.iter().map(typing).collect::<Result<_, _>>()?);
    let refused = compile(rules, SeccompAction::Allow, SeccompAction::Errno(libc::EPERM as u32))?;
    Ok([refused, no_clone3()?])
}

/// clone3 keeps its flags where no filter can see them. Told that there is none, libc takes clone.
fn no_clone3() -> anyhow::Result<BpfProgram> {
    let clone3 = Rules::from([(libc::SYS_clone3, Vec::new())]);
    compile(clone3, SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS as u32))
}

fn server_filter() -> anyhow::Result<BpfProgram> {
    let mut rules: Rules = SERVED.iter().map(|call| (*call, Vec::new())).collect();
    rules.insert(libc::SYS_mmap, vec![rule(vec![lacks(2, libc::PROT_EXEC)])?]);
    rules.insert(libc::SYS_mprotect, vec![rule(vec![lacks(2, libc::PROT_EXEC)])?]);
    allow_on_descriptors(&mut rules, &[NONBLOCKING])?;
    compile(rules, SeccompAction::Errno(libc::EPERM as u32), SeccompAction::Allow)
}

fn sender_filter() -> anyhow::Result<BpfProgram> {
    let mut rules: Rules = SERVED.iter().chain(SENT).map(|call| (*call, Vec::new())).collect();
    // A library's code is mapped, and never written.
    let either = [rule(vec![lacks(2, libc::PROT_EXEC)])?, rule(vec![lacks(2, libc::PROT_WRITE)])?];
    rules.insert(libc::SYS_mmap, either.into());
    rules.insert(libc::SYS_mprotect, vec![rule(vec![lacks(2, libc::PROT_EXEC)])?]);
    let family = |family: &libc::c_int| rule(vec![condition(0, SeccompCmpOp::Eq, *family as u64)]);
    rules.insert(libc::SYS_socket, SENDERS_FAMILIES.iter().map(family).collect::<Result<_, _>>()?);
    // Threads, and no processes.
    let thread = libc::CLONE_THREAD as u64;
    rules.insert(libc::SYS_clone, vec![rule(vec![condition(0, SeccompCmpOp::MaskedEq(thread), thread)])?]);
    allow_on_descriptors(&mut rules, &[NONBLOCKING, PENDING])?;
    // What libc is told is absent has to get past this one.
    rules.insert(libc::SYS_clone3, Vec::new());
    compile(rules, SeccompAction::Errno(libc::EPERM as u32), SeccompAction::Allow)
}

fn lacks(argument: u8, bit: libc::c_int) -> Result<SeccompCondition, seccompiler::BackendError> {
    condition(argument, SeccompCmpOp::MaskedEq(bit as u64), 0)
}

/// Flags of descriptors, and these requests to them.
fn allow_on_descriptors(rules: &mut Rules, requests: &[u64]) -> anyhow::Result<()> {
    let is = |argument, value: u64| rule(vec![condition(argument, SeccompCmpOp::Eq, value)]);
    let requests = requests.iter().map(|request| is(1, *request));
    rules.insert(libc::SYS_ioctl, requests.collect::<Result<_, _>>()?);
    let of_descriptors = [libc::F_GETFL, libc::F_SETFL, libc::F_GETFD, libc::F_SETFD];
    let of_descriptors = of_descriptors.map(|command| is(1, command as u64));
    rules.insert(libc::SYS_fcntl, of_descriptors.into_iter().collect::<Result<_, _>>()?);
    Ok(())
}

/// By system call; a call without rules matches whatever its arguments.
type Rules = BTreeMap<libc::c_long, Vec<SeccompRule>>;

/// The kernel looks at the low half only of what it takes as an int; so must we.
fn condition(
    argument: u8,
    operator: SeccompCmpOp,
    value: u64,
) -> Result<SeccompCondition, seccompiler::BackendError> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value & u64::from(u32::MAX))
}

fn rule(
    conditions: Vec<Result<SeccompCondition, seccompiler::BackendError>>,
) -> Result<SeccompRule, seccompiler::BackendError> {
    SeccompRule::new(conditions.into_iter().collect::<Result<_, _>>()?)
}

fn compile(rules: Rules, otherwise: SeccompAction, matched: SeccompAction) -> anyhow::Result<BpfProgram> {
    let arch = TargetArch::try_from(std::env::consts::ARCH).context("seccomp on this architecture")?;
    let filter = SeccompFilter::new(rules, otherwise, matched, arch).context("a seccomp filter")?;
    let mut program = without_x32();
    program.extend(BpfProgram::try_from(filter).context("a seccomp filter")?);
    Ok(program)
}

/// x86 has every call a second time, with other numbers that no rule names: there are none
/// for us.
#[cfg(target_arch = "x86_64")]
fn without_x32() -> BpfProgram {
    const X32: u32 = 0x4000_0000;
    let statement = |code, jt, jf, k| seccompiler::sock_filter { code, jt, jf, k };
    vec![
        // The call's number comes first in seccomp_data.
        statement((libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16, 0, 0, 0),
        statement((libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16, 0, 1, X32),
        statement((libc::BPF_RET | libc::BPF_K) as u16, 0, 0, libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32),
    ]
}

#[cfg(not(target_arch = "x86_64"))]
fn without_x32() -> BpfProgram {
    BpfProgram::new()
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{TcpListener, TcpStream};
    use std::process::Command;

    use super::*;
    use crate::sys::attempt::Attempt;

    /// Filters belong to threads, and end with them.
    fn on_a_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
        std::thread::spawn(work).join().expect("a thread")
    }

    #[test]
    fn the_daemon_is_refused_what_it_does_not_need_and_its_children_run() {
        let (through, child, thread) = on_a_thread(|| {
            confine_daemon().expect("a filter");
            let through: Vec<String> =
                Attempt::OF_A_DAEMON.into_iter().filter_map(Attempt::gets_through).collect();
            // A pipeline needs clone, pipes, exec and wait; a child is held like its parent.
            let script = "echo seen | cat; unshare --user true 2>/dev/null || echo refused";
            let child = Command::new("sh").args(["-c", script]).output().expect("sh");
            (through, child, std::thread::spawn(|| 7).join())
        });
        assert_eq!(through, [] as [String; 0]);
        assert_eq!(String::from_utf8_lossy(&child.stdout), "seen\nrefused\n");
        assert_eq!(thread.expect("a thread of a thread"), 7);
        // What it is for is let through to the kernel, which says what it thinks.
        on_a_thread(|| {
            confine_daemon().expect("a filter");
            for needed in [Attempt::Netlink, Attempt::Internet, Attempt::Open] {
                let said = needed.gets_through().unwrap_or_default();
                assert!(said.ends_with("is possible"), "{needed:?}: {said}");
            }
            for needed in [Attempt::Execute, Attempt::Fork] {
                // The fork asks for a user namespace.
                assert_eq!(needed.gets_through().is_none(), needed == Attempt::Fork, "{needed:?}");
            }
        });
    }

    #[test]
    fn only_sockets_of_the_kinds_in_use_can_be_made() {
        on_a_thread(|| {
            use rustix::net::{AddressFamily, SocketType, socket};
            confine_daemon().expect("a filter");
            for family in [AddressFamily::from_raw(38), AddressFamily::from_raw(40)] {
                let refused = socket(family, SocketType::SEQPACKET, None).map(drop);
                assert_eq!(refused, Err(rustix::io::Errno::PERM), "{family:?}");
            }
            assert!(socket(AddressFamily::UNIX, SocketType::STREAM, None).is_ok());
        });
    }

    #[test]
    fn the_server_moves_bytes_and_can_do_nothing_else() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
        let address = listener.local_addr().expect("an address");
        let client = std::thread::spawn(move || {
            let mut client = TcpStream::connect(address).expect("connect");
            client.write_all(b"ask").expect("write");
            let mut answer = String::new();
            client.read_to_string(&mut answer).expect("read");
            answer
        });
        let through = on_a_thread(move || {
            confine_server().expect("a filter");
            let (mut stream, _) = listener.accept().expect("accept");
            let mut asked = [0; 3];
            stream.read_exact(&mut asked).expect("read");
            stream.write_all(&asked).expect("write");
            // Memory comes and goes as ever.
            drop(std::hint::black_box(vec![1u8; 8 << 20]));
            let all = Attempt::OF_A_SERVER.into_iter().chain(Attempt::OF_A_DAEMON);
            all.filter_map(Attempt::gets_through).collect::<Vec<String>>()
        });
        assert_eq!(through, [] as [String; 0]);
        assert_eq!(client.join().expect("a client"), "ask");
    }
}
