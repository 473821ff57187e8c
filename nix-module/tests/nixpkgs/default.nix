# Stands for nixpkgs: a derivation is a name here, and what was said about it. What is for arm64 has
# another path. `buildSystem`: where another machine builds.
{
  lib ? import ../minilib.nix,
  system ? "x86_64-linux",
  buildSystem ? system,
  overlays ? [ ],
}:
let
  derivation =
    name: more:
    {
      type = "derivation";
      outPath = "/nix/store/${if system == "aarch64-linux" then "arm64" else "stub"}-${name}";
      inherit name;
    }
    // more;
  rustPlatform = {
    importCargoLock = { lockFile }: derivation "vendor" { inherit lockFile; };
    buildRustPackage = package: derivation package.pname (package // package.passthru);
  };
  linker = derivation "bpf-linker" {
    override = { llvmPackagesForLinker }: derivation "bpf-linker-${llvmPackagesForLinker.name}" { };
  };
  toolchain = derivation "rust" { override = _: derivation "rust-with-src" { override = _: toolchain; }; };

  pkgs = {
    inherit lib rustPlatform;
    makeRustPlatform = _: rustPlatform;
    rust-bin.stable."1.95.0".minimal = toolchain;
    bpf-linker = linker;
    symlinkJoin = { name, paths }: derivation name { inherit paths; };
    mkShell = derivation "shell";
    callPackage =
      path: more:
      let
        make = import path;
      in
      make (builtins.intersectAttrs (builtins.functionArgs make) pkgs // more);

    stdenv.buildPlatform = {
      system = buildSystem;
      canExecute = platform: platform.system == buildSystem;
    };
    stdenv.hostPlatform = { inherit system; };
    buildPackages =
      if system == buildSystem then
        pkgs
      else
        import ./. {
          inherit lib overlays;
          system = buildSystem;
        };
    formats.toml = _: {
      type =
        let
          value = lib.types.oneOf [
            lib.types.bool
            lib.types.int
            lib.types.float
            lib.types.str
            lib.types.path
            (lib.types.attrsOf value)
            (lib.types.listOf value)
          ];
        in
        value;
      generate = name: value: derivation name { inherit value; };
    };
    runCommand =
      name: more: script:
      derivation name (more // { inherit script; });
    writeText = name: text: derivation name { inherit text; };
    testers.runNixOSTest = test: test;
    path = ./.;
  }
  // lib.genAttrs [
    "coreutils"
    "curl"
    "installShellFiles"
    "iproute2"
    "llvmPackages_22"
    "netcat"
    "nftables"
    "nix"
    "nixfmt-tree"
    "nmap"
    "python3"
    "spokeguard"
    "wireguard-tools"
  ] (name: derivation name { });
in
pkgs
