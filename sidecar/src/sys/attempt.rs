//! System calls that must be refused: made on purpose, to see that they are.
//!
//! A refusal is EPERM or EACCES, which the kernel and our filters give; any other error means
//! that the kernel was asked and only minded the arguments. Each attempt is made so that it
//! would do no harm if it were let through.

use std::io;

/// What is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt {
    Netlink,
    Internet,
    Packet,
    Bpf,
    Open,
    Execute,
    Fork,
    Signal,
    Trace,
    Mount,
    NewNamespace,
    NewUserNamespace,
    EnterNamespace,
    ReadMemory,
    LoadModule,
    Keyring,
    Perf,
    IoUring,
    OpenByHandle,
    SetClock,
}

impl Attempt {
    /// What something that must not have the kernel's ear can't do.
    pub const OF_A_SERVER: [Attempt; 12] = [
        Attempt::Netlink,
        Attempt::Bpf,
        Attempt::Internet,
        Attempt::Packet,
        Attempt::Open,
        Attempt::Execute,
        Attempt::Fork,
        Attempt::Signal,
        Attempt::Mount,
        Attempt::NewNamespace,
        Attempt::ReadMemory,
        Attempt::LoadModule,
    ];

    /// What one that only asks other hosts can't do. Opening "/" is Landlock's to refuse.
    pub const OF_A_SENDER: [Attempt; 9] = [
        Attempt::Bpf,
        Attempt::Packet,
        Attempt::Execute,
        Attempt::Fork,
        Attempt::Signal,
        Attempt::Mount,
        Attempt::NewNamespace,
        Attempt::ReadMemory,
        Attempt::LoadModule,
    ];

    /// What a daemon that enforces can do without.
    pub const OF_A_DAEMON: [Attempt; 12] = [
        Attempt::Trace,
        Attempt::Mount,
        Attempt::NewNamespace,
        Attempt::NewUserNamespace,
        Attempt::EnterNamespace,
        Attempt::ReadMemory,
        Attempt::LoadModule,
        Attempt::Keyring,
        Attempt::Perf,
        Attempt::IoUring,
        Attempt::OpenByHandle,
        Attempt::SetClock,
    ];

    pub const fn name(self) -> &'static str {
        match self {
            Attempt::Netlink => "a netlink socket",
            Attempt::Internet => "a socket of its own",
            Attempt::Packet => "a packet socket",
            Attempt::Bpf => "bpf()",
            Attempt::Open => "opening a file",
            Attempt::Execute => "running a program",
            Attempt::Fork => "making a process",
            Attempt::Signal => "signalling a process",
            Attempt::Trace => "tracing a process",
            Attempt::Mount => "a mount",
            Attempt::NewNamespace => "a namespace of its own",
            Attempt::NewUserNamespace => "a process in a user namespace of its own",
            Attempt::EnterNamespace => "entering a namespace",
            Attempt::ReadMemory => "reading another process's memory",
            Attempt::LoadModule => "loading a kernel module",
            Attempt::Keyring => "the kernel's keyrings",
            Attempt::Perf => "perf events",
            Attempt::IoUring => "io_uring",
            Attempt::OpenByHandle => "opening a file past its directories",
            Attempt::SetClock => "setting the clock",
        }
    }

    /// Tries it. `None`: refused, as it should be.
    pub fn gets_through(self) -> Option<String> {
        match self.make() {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => None,
            Ok(()) => Some(format!("{} is possible", self.name())),
            Err(error) => Some(format!("{} is not refused: {error}", self.name())),
        }
    }

    fn make(self) -> io::Result<()> {
        use libc::c_long;
        const BAD: c_long = -1;
        /// A kind of namespace and a flag that exclude each other: EINVAL, and no process.
        const NEVER: c_long = (libc::CLONE_NEWUSER | libc::CLONE_FS) as c_long;
        /// No bit that unshare knows: EINVAL.
        const NO_NAMESPACE: c_long = 1;
        let stream = c_long::from(libc::SOCK_STREAM | libc::SOCK_CLOEXEC);
        let raw = c_long::from(libc::SOCK_RAW | libc::SOCK_CLOEXEC);
        let root = c"/".as_ptr() as c_long;
        let (call, arguments): (c_long, [c_long; 6]) = match self {
            Attempt::Netlink => (libc::SYS_socket, [libc::AF_NETLINK.into(), raw, 0, 0, 0, 0]),
            Attempt::Internet => (libc::SYS_socket, [libc::AF_INET.into(), stream, 0, 0, 0, 0]),
            Attempt::Packet => (libc::SYS_socket, [libc::AF_PACKET.into(), raw, 0, 0, 0, 0]),
            // No such command.
            Attempt::Bpf => (libc::SYS_bpf, [0xffff, 0, 0, 0, 0, 0]),
            Attempt::Open => {
                (libc::SYS_openat, [libc::AT_FDCWD.into(), root, libc::O_CLOEXEC.into(), 0, 0, 0])
            }
            // No path: EFAULT before anything is replaced.
            Attempt::Execute => (libc::SYS_execve, [0; 6]),
            // The same, so that even a fork that is let through makes no process.
            Attempt::Fork | Attempt::NewUserNamespace => (libc::SYS_clone, [NEVER, 0, 0, 0, 0, 0]),
            // Signal 0 is only a question.
            Attempt::Signal => (libc::SYS_kill, [1, 0, 0, 0, 0, 0]),
            // No such request.
            Attempt::Trace => (libc::SYS_ptrace, [0xffff, 1, 0, 0, 0, 0]),
            Attempt::Mount => (libc::SYS_mount, [0; 6]),
            Attempt::NewNamespace => (libc::SYS_unshare, [NO_NAMESPACE, 0, 0, 0, 0, 0]),
            Attempt::EnterNamespace => (libc::SYS_setns, [BAD, 0, 0, 0, 0, 0]),
            Attempt::ReadMemory => (libc::SYS_process_vm_readv, [1, 0, 0, 0, 0, 0]),
            Attempt::LoadModule => (libc::SYS_finit_module, [BAD, 0, 0, 0, 0, 0]),
            // No such operation.
            Attempt::Keyring => (libc::SYS_keyctl, [0xffff, 0, 0, 0, 0, 0]),
            Attempt::Perf => (libc::SYS_perf_event_open, [0, BAD, BAD, BAD, 0, 0]),
            Attempt::IoUring => (libc::SYS_io_uring_setup, [0; 6]),
            Attempt::OpenByHandle => (libc::SYS_open_by_handle_at, [BAD, 0, 0, 0, 0, 0]),
            // No such clock.
            Attempt::SetClock => (libc::SYS_clock_settime, [0xffff, 0, 0, 0, 0, 0]),
        };
        let [a, b, c, d, e, f] = arguments;
        // SAFETY: the only pointer among the arguments is a static string; where a call takes
        // others, they are null, which the kernel answers with EFAULT. None of them writes to
        // our memory, and none can start a process or replace this one.
        let result = unsafe { libc::syscall(call, a, b, c, d, e, f) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        if matches!(self, Attempt::Netlink | Attempt::Internet | Attempt::Packet | Attempt::Open)
            && let Ok(descriptor) = i32::try_from(result)
        {
            // SAFETY: the call just returned this descriptor, and nobody else has it.
            unsafe { libc::close(descriptor) };
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attempt_that_nothing_refuses_says_so_and_does_no_harm() {
        // Whoever runs the tests may open a directory and be told of their own arguments.
        assert_eq!(Attempt::Open.gets_through().as_deref(), Some("opening a file is possible"));
        let fork = Attempt::Fork.gets_through().expect("not refused");
        assert!(fork.contains("is not refused: Invalid argument"), "{fork}");
        let execute = Attempt::Execute.gets_through().expect("not refused");
        assert!(execute.contains("Bad address"), "{execute}");
        for attempt in Attempt::OF_A_DAEMON.into_iter().chain(Attempt::OF_A_SERVER) {
            let _ = attempt.gets_through();
        }
    }
}
