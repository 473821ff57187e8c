# Stands for nixpkgs: a derivation is a name here, and what was said about it.
{
  lib ? import ../minilib.nix,
  system ? "x86_64-linux",
  overlays ? [ ],
}:
let
  derivation =
    name: more:
    {
      type = "derivation";
      outPath = "/nix/store/stub-${name}";
      inherit name;
    }
    // more;
  rustPlatform = {
    importCargoLock = { lockFile }: derivation "vendor" { inherit lockFile; };
    buildRustPackage = package: derivation package.pname package;
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

    stdenv.buildPlatform.canExecute = _: true;
    stdenv.hostPlatform = { inherit system; };
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
      name: _: script:
      derivation name { inherit script; };
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
