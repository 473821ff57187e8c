# spokeguard's program. Its eBPF objects are built by a compiler that comes with the source of its
# library (`toolchain`, such as rust-overlay's with the extension rust-src), or were built before
# (`ebpfObjects`, a folder with the four *.bpf.o: they are the same for every architecture).
# `bpf-linker` reads what that compiler writes: its LLVM must not be older than the compiler's, as
# nixpkgs' may be (see flake.nix).
{
  lib,
  stdenv,
  buildPackages,
  makeRustPlatform,
  rustPlatform,
  bpf-linker,
  installShellFiles,
  symlinkJoin,
  toolchain ? null,
  ebpfObjects ? null,
}:
assert lib.assertMsg (toolchain != null || ebpfObjects != null)
  "spokeguard: give a Rust toolchain with rust-src (toolchain) or the eBPF objects (ebpfObjects)";
let
  platform =
    if toolchain == null then
      rustPlatform
    else
      makeRustPlatform {
        cargo = toolchain;
        rustc = toolchain;
      };
  locked = platform.importCargoLock { lockFile = ../Cargo.lock; };
  runs = stdenv.buildPlatform.canExecute stdenv.hostPlatform;
  # The same program for the machine that builds, where that can't run this one: for what the
  # program itself writes, and for whoever has a policy checked.
  forBuild = buildPackages.callPackage ./package.nix { inherit bpf-linker ebpfObjects toolchain; };
  program = if runs then "$out/bin/spokeguard" else lib.getExe' forBuild "spokeguard";
  # Cargo resolves the library's own dependencies, too, when it builds `core`.
  library = platform.importCargoLock {
    lockFile = "${toolchain}/lib/rustlib/src/rust/library/Cargo.lock";
  };
in
platform.buildRustPackage {
  pname = "spokeguard";
  inherit ((lib.importTOML ../Cargo.toml).workspace.package) version;

  src = lib.fileset.toSource {
    root = ../.;
    fileset = lib.fileset.unions [
      ../Cargo.lock
      ../Cargo.toml
      ../contrib
      ../sidecar
      ../sidecar-ebpf
      ../tests
      ../vm-tests
      ../xtask
    ];
  };

  # The first of two files of one name is taken, which is our Cargo.lock. The name is the folder's
  # in the build, which Cargo's configuration of both looks for.
  cargoDeps =
    if ebpfObjects != null then
      locked
    else
      symlinkJoin {
        name = "cargo-vendor-dir";
        paths = [
          locked
          library
        ];
      };
  cargoBuildFlags = [
    "--package"
    "spokeguard"
  ];
  # The tests want root, network namespaces and a kernel of their own: `cargo xtask test`.
  doCheck = false;

  nativeBuildInputs = [ installShellFiles ] ++ lib.optional (ebpfObjects == null) bpf-linker;
  env =
    if ebpfObjects != null then
      { SPOKEGUARD_EBPF_OBJECTS = "${ebpfObjects}"; }
    else
      {
        SPOKEGUARD_BPF_CARGO = "${toolchain}/bin/cargo";
        SPOKEGUARD_BPF_RUSTC = "${toolchain}/bin/rustc";
      };

  postInstall = ''
    mkdir man
    ${program} man --dir man
    installManPage man/*
    for shell in bash fish zsh; do
      ${program} completions $shell > spokeguard.$shell
    done
    installShellCompletion spokeguard.{bash,fish,zsh}
  '';

  passthru = lib.optionalAttrs (!runs) { inherit forBuild; };

  meta = {
    description = "Holds a host to what its policy exposes, and proves it";
    license = [
      lib.licenses.mit
      lib.licenses.asl20
    ];
    mainProgram = "spokeguard";
    platforms = [
      "aarch64-linux"
      "x86_64-linux"
    ];
  };
}
