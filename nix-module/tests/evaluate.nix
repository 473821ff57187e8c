# Evaluates the module without NixOS: `nix-instantiate --eval --strict --json -A NAME`.
# `lib`: nixpkgs' own, where it can be had.
{
  lib ? import ./minilib.nix,
}:
let
  pkgs = import ./nixpkgs { inherit lib; };

  evaluate = evaluateWith pkgs;
  evaluateWith =
    pkgs: modules:
    (lib.evalModules {
      modules = [ ./stubs.nix ] ++ modules;
      specialArgs = { inherit pkgs; };
    }).config;

  host = hostWith pkgs;
  # What the tests ask of a host.
  hostWith =
    pkgs: modules:
    let
      config = evaluateWith pkgs modules;
    in
    {
      errors = map (entry: entry.message) (lib.filter (entry: !entry.assertion) config.assertions);
      inherit (config) warnings;
      policy = config.services.spokeguard.policyText or null;
      inherit (config.networking) firewall nftables;
      inherit (config.services) openssh;
      wireguard = config.networking.wireguard.interfaces;
      wgQuick = config.networking.wg-quick.interfaces;
      inherit (config.services) prometheus;
      inherit (config.nix) gc;
      inherit (config.boot) loader;
      inherit (config.systemd) services sockets;
      # Of a file: where it is, and the text or the script that makes it.
      etc = builtins.mapAttrs (
        _: file: if file ? source then removeAttrs file.source [ "outPath" ] else file
      ) config.environment.etc;
    };

  cases = import ./cases.nix { inherit lib; };
  spoke = name: module: [
    ../module.nix
    cases.spoke
    module
  ];
  judge =
    name: case:
    let
      seen = host (spoke name case.module);
    in
    {
      errors = map (text: "services.spokeguard: ${text}") (case.errors or [ ]);
      warnings = map (text: "services.spokeguard: ${text}") (case.warnings or [ ]);
      inherit seen;
    };

  flake = (import ../../flake.nix).outputs {
    self = flake;
    nixpkgs = {
      outPath = ./nixpkgs;
      inherit lib;
    };
    rust-overlay.overlays.default = _: _: { };
  };
in
{
  fleet = builtins.mapAttrs (_: node: host [ node ]) (import ../examples/fleet.nix { });
  # The same from the variables that `spokeguard fleet render` writes.
  rendered =
    path:
    let
      inventory = builtins.fromJSON (builtins.readFile path);
    in
    builtins.mapAttrs (_: node: host [ node ]) (
      import ../examples/fleet.nix {
        nodes = builtins.attrValues inventory.nodes;
        hub = inventory.nodes.${inventory.hub};
      }
    );

  # Cases with the errors and warnings that they must have, and what came of them.
  cases = builtins.mapAttrs judge cases.cases;
  # Each must stop the evaluation.
  broken = builtins.mapAttrs (name: module: host (spoke name module)) cases.broken;
  # What is loaded when the sealed rules can't be, on a host whose tunnel is not called wg0.
  shut =
    (host (
      spoke "shut" {
        services.spokeguard.settings.mesh.interface = "mesh7";
        services.spokeguard.settings.mesh.listen_port = 4500;
      }
    )).etc."spokeguard/shut.nft".text;
  # A policy file taken as it is.
  file =
    path:
    host [
      ../module.nix
      {
        services.spokeguard.enable = true;
        services.spokeguard.policyFile = path;
      }
    ];

  # The nodes of the VM test as hosts, and its script.
  vmTest =
    let
      test = import ../vm-test.nix {
        inherit pkgs;
        keys = {
          peer0 = {
            privateKey = "a";
            publicKey = "A";
          };
          peer1 = {
            privateKey = "b";
            publicKey = "B\n";
          };
        };
      };
    in
    {
      inherit (test) name testScript;
      nodes = builtins.mapAttrs (_: node: host [ node ]) test.nodes;
    };

  # What the flake gives, by the same stand-ins.
  flake =
    let
      host = evaluate [
        flake.nixosModules.default
        {
          services.spokeguard.enable = true;
          services.spokeguard.policyFile = ../../examples/spoke.toml;
        }
      ];
    in
    {
      outputs = builtins.attrNames flake;
      package = {
        inherit (flake.packages.aarch64-linux.default)
          pname
          version
          env
          nativeBuildInputs
          postInstall
          cargoDeps
          meta
          ;
      };
      used = "${host.services.spokeguard.package}";
      overlay = flake.overlays.default pkgs pkgs == { spokeguard = flake.packages.x86_64-linux.default; };
      vm = flake.checks.x86_64-linux.vm.name;
      shell = flake.devShells.x86_64-linux.default.packages;
      formatter = builtins.attrNames flake.formatter;
    };

  # A host of arm64 that a machine of x86_64 builds: its errors and warnings, and its policy's file.
  cross =
    let
      crossed = import ./nixpkgs {
        inherit lib;
        system = "aarch64-linux";
        buildSystem = "x86_64-linux";
      };
      # spokeguard is no part of nixpkgs: without an overlay only `package` is known.
      bare = crossed // {
        buildPackages = removeAttrs crossed.buildPackages [ "spokeguard" ];
      };
      package = bare.callPackage ../package.nix { toolchain = crossed.rust-bin.stable."1.95.0".minimal; };
      built =
        pkgs: spokeguard: more:
        let
          seen = hostWith pkgs [
            spokeguard
            cases.spoke
            { services.spokeguard = more; }
          ];
        in
        {
          inherit (seen) errors warnings;
          policy = seen.etc."spokeguard/policy.toml";
          run = seen.services.spokeguard.serviceConfig.ExecStart;
        };
    in
    {
      overlay = built crossed ../module.nix { };
      flake = built bare flake.nixosModules.default { };
      package = built bare ../module.nix { inherit package; };
      unchecked = built bare ../module.nix { };
      unasked = built bare ../module.nix { checkPolicy = false; };
      # What the program writes for its package.
      written = package.postInstall;
    };
  # The package with objects that were built before, and with nothing to build them.
  given = {
    inherit (pkgs.callPackage ../package.nix { ebpfObjects = "/objects"; })
      env
      nativeBuildInputs
      cargoDeps
      ;
  };
  neither = (pkgs.callPackage ../package.nix { }).pname;

  # Every option with its default and its description, for the table in the README.
  options = import ./options.nix {
    inherit lib;
    evaluated = lib.evalModules {
      modules = [
        ./stubs.nix
        ../module.nix
      ];
      specialArgs = { inherit pkgs; };
    };
  };
}
