# The options of NixOS that the module reads or sets, with what NixOS makes of them where that matters
# (sshd's openFirewall, nftables' flushRuleset). Written by hand after NixOS' modules of 2024 and 2025.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  inherit (lib) mkOption types;
  option = type: default: mkOption { inherit type default; };
  any = mkOption {
    type = types.attrsOf types.anything;
    default = { };
  };
  flag = option types.bool false;
  texts = option (types.listOf types.str) [ ];
  text = option (types.nullOr types.str) null;
  number = option (types.nullOr types.int) null;
  sub = options: types.submodule { inherit options; };

  ranges = option (types.listOf (types.attrsOf types.port)) [ ];
  gate = {
    allowedTCPPorts = option (types.listOf types.port) [ ];
    allowedUDPPorts = option (types.listOf types.port) [ ];
    allowedTCPPortRanges = ranges;
    allowedUDPPortRanges = ranges;
  };
  peer = {
    name = text;
    publicKey = mkOption { type = types.singleLineStr; };
    endpoint = text;
    allowedIPs = texts;
    persistentKeepalive = number;
  };
  unit = {
    description = option types.str "";
    documentation = texts;
    wantedBy = texts;
    wants = texts;
    after = texts;
    before = texts;
    conflicts = texts;
    restartIfChanged = option types.bool true;
    stopIfChanged = option types.bool true;
    reloadTriggers = option (types.listOf types.anything) [ ];
    path = option (types.listOf types.anything) [ ];
    environment = any;
    unitConfig = any;
    serviceConfig = any;
    socketConfig = any;
  };
in
{
  options = {
    assertions = option (types.listOf types.anything) [ ];
    warnings = texts;
    system.stateVersion = option types.str "26.05";

    networking.hostName = option types.str "nixos";
    networking.useDHCP = option types.bool true;
    networking.interfaces = any;
    networking.firewall = gate // {
      enable = option types.bool true;
      interfaces = option (types.attrsOf (sub gate)) { };
      trustedInterfaces = texts;
      extraInputRules = option types.lines "";
    };
    networking.nftables = {
      enable = flag;
      flushRuleset = flag;
      ruleset = option types.lines "";
      rulesetFile = option (types.nullOr types.path) null;
      tables = any;
    };
    networking.wireguard.interfaces = option (types.attrsOf (sub {
      ips = texts;
      listenPort = number;
      privateKeyFile = text;
      peers = option (types.listOf (sub peer)) [ ];
    })) { };
    networking.wg-quick.interfaces = option (types.attrsOf (sub {
      address = texts;
      listenPort = number;
      privateKeyFile = text;
      peers = option (types.listOf (sub (removeAttrs peer [ "name" ]))) [ ];
    })) { };

    services.openssh = {
      enable = flag;
      openFirewall = option types.bool true;
      startWhenNeeded = flag;
      ports = option (types.listOf types.port) [ 22 ];
      listenAddresses = option (types.listOf (sub {
        addr = text;
        port = number;
      })) [ ];
      settings.PasswordAuthentication = option (types.nullOr types.bool) true;
      settings.KbdInteractiveAuthentication = option (types.nullOr types.bool) true;
    };
    services.tailscale.enable = flag;
    services.tailscale.interfaceName = option types.str "tailscale0";
    services.prometheus.enable = flag;
    services.prometheus.listenAddress = option types.str "0.0.0.0";
    services.prometheus.scrapeConfigs = option (types.listOf types.anything) [ ];

    systemd.network.enable = flag;
    systemd.services = option (types.attrsOf (sub unit)) { };
    systemd.sockets = option (types.attrsOf (sub unit)) { };
    environment.etc = any;
    environment.systemPackages = option (types.listOf types.package) [ ];

    boot.loader.grub.configurationLimit = option types.int 100;
    boot.loader.systemd-boot.configurationLimit = number;
    boot.loader.generic-extlinux-compatible.configurationLimit = option types.int 20;
    nix.gc.automatic = flag;
    nix.gc.dates = option types.str "03:15";
    nix.package = option types.package pkgs.nix;
  };

  config = {
    networking.firewall.allowedTCPPorts = lib.mkIf (
      config.services.openssh.enable && config.services.openssh.openFirewall
    ) config.services.openssh.ports;
    networking.nftables.flushRuleset = lib.mkIf config.networking.nftables.enable (
      lib.mkDefault (
        builtins.compareVersions config.system.stateVersion "23.11" < 0
        || config.networking.nftables.rulesetFile != null
        || config.networking.nftables.ruleset != ""
      )
    );
  };
}
