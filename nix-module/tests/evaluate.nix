# Evaluates the module without NixOS: `nix-instantiate --eval --strict --json -A NAME`.
# `lib`: nixpkgs' own, where it can be had.
{
  lib ? import ./minilib.nix,
}:
let
  # A derivation is a name here, and what was said about it.
  derivation =
    name: more:
    {
      type = "derivation";
      outPath = "/nix/store/stub-${name}";
      inherit name;
    }
    // more;
  pkgs = {
    stdenv.buildPlatform.canExecute = _: true;
    stdenv.hostPlatform = { };
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
  }
  // builtins.mapAttrs (name: _: derivation name { }) {
    coreutils = null;
    curl = null;
    netcat = null;
    nftables = null;
    nix = null;
    nmap = null;
    python3 = null;
    spokeguard = null;
    wireguard-tools = null;
  };

  evaluate =
    modules:
    (lib.evalModules {
      modules = [ ./stubs.nix ] ++ modules;
      specialArgs = { inherit pkgs; };
    }).config;

  # What the tests ask of a host.
  host =
    modules:
    let
      config = evaluate modules;
    in
    {
      errors = map (entry: entry.message) (lib.filter (entry: !entry.assertion) config.assertions);
      inherit (config) warnings;
      policy = config.services.spokeguard.policyText;
      inherit (config.networking) firewall nftables;
      inherit (config.services) openssh;
      wireguard = config.networking.wireguard.interfaces;
      wgQuick = config.networking.wg-quick.interfaces;
      scrape = config.services.prometheus.scrapeConfigs;
      inherit (config.nix) gc;
      inherit (config.boot) loader;
      inherit (config.systemd) services sockets;
      # Of a file: where it is, and the text or the script that makes it.
      etc = builtins.mapAttrs (_: file: removeAttrs file.source [ "type" ]) config.environment.etc;
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
      errors = case.errors or [ ];
      warnings = case.warnings or [ ];
      inherit seen;
    };
in
{
  fleet = builtins.mapAttrs (_: node: host [ node ]) (import ../examples/fleet.nix { });

  # Cases with the errors and warnings that they must have, and what came of them.
  cases = builtins.mapAttrs judge cases.cases;
  # Each must stop the evaluation.
  broken = builtins.mapAttrs (name: module: host (spoke name module)) cases.broken;
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
            publicKey = "B";
          };
        };
      };
    in
    {
      inherit (test) name testScript;
      nodes = builtins.mapAttrs (_: node: host [ node ]) test.nodes;
    };

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
