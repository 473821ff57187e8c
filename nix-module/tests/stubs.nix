# The options of NixOS that the module reads or sets, with what NixOS makes of them where that matters
# (sshd's openFirewall, nftables' flushRuleset). Written by hand after NixOS' modules of 26.05.
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

  # Sorted, and each once.
  ports = mkOption {
    type = types.listOf types.port;
    default = [ ];
    apply = list: lib.unique (builtins.sort builtins.lessThan list);
  };
  ranges = option (types.listOf (types.attrsOf types.port)) [ ];
  gate = {
    allowedTCPPorts = ports;
    allowedUDPPorts = ports;
    allowedTCPPortRanges = ranges;
    allowedUDPPortRanges = ranges;
  };
  peer = {
    publicKey = mkOption { type = types.singleLineStr; };
    endpoint = text;
    allowedIPs = texts;
    persistentKeepalive = number;
  };
  # By default its key, as a unit's name may have it.
  named =
    { config, ... }:
    {
      options = peer // {
        name = option types.str (builtins.replaceStrings [ "/" "=" ] [ "-" "\\x3d" ] config.publicKey);
      };
    };
  # A value or a list of them: lists are joined, and one of each is an error.
  section =
    let
      value = types.oneOf [
        types.bool
        types.int
        types.str
      ];
    in
    option (types.attrsOf (types.either (types.listOf value) value)) { };
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
    unitConfig = section;
    serviceConfig = section;
    socketConfig = section;
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
      backend = option types.str (
        if config.services.firewalld.enable then
          "firewalld"
        else if config.networking.nftables.enable then
          "nftables"
        else
          "iptables"
      );
      interfaces = option (types.attrsOf (sub gate)) { };
      trustedInterfaces = texts;
      extraInputRules = option types.lines "";
      extraCommands = option types.lines "";
    };
    networking.nftables = {
      enable = flag;
      flushRuleset = flag;
      ruleset = option types.lines "";
      rulesetFile = option (types.nullOr types.path) null;
      tables = option (types.attrsOf (sub {
        family = mkOption { type = types.str; };
        content = mkOption { type = types.lines; };
      })) { };
    };
    networking.wireguard.useNetworkd = flag;
    networking.wireguard.interfaces = option (types.attrsOf (sub {
      ips = texts;
      listenPort = number;
      privateKeyFile = text;
      peers = option (types.listOf (types.submodule named)) [ ];
    })) { };
    networking.wg-quick.interfaces = option (types.attrsOf (sub {
      address = texts;
      configFile = text;
      listenPort = number;
      privateKeyFile = text;
      peers = option (types.listOf (sub peer)) [ ];
    })) { };

    services.openssh = {
      enable = flag;
      openFirewall = option types.bool true;
      startWhenNeeded = flag;
      ports = option (types.listOf types.port) [ 22 ];
      listenAddresses = option (types.listOf (sub {
        addr = text;
        port = option (types.nullOr types.port) null;
      })) [ ];
      settings.PasswordAuthentication = option (types.nullOr types.bool) true;
      settings.KbdInteractiveAuthentication = option (types.nullOr types.bool) true;
    };
    services.firewalld.enable = flag;
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
    nix.gc.dates = mkOption {
      type = types.either types.singleLineStr texts.type;
      default = [ "03:15" ];
      apply = dates: if builtins.isList dates then dates else [ dates ];
    };
    nix.enable = option types.bool true;
    nix.package = option types.package pkgs.nix;
  };

  config = {
    assertions = [
      {
        assertion = config.nix.gc.automatic -> config.nix.enable;
        message = "nix.gc.automatic without Nix";
      }
    ]
    ++ lib.mapAttrsToList (name: interface: {
      assertion = interface.privateKeyFile != null;
      message = "${name} without a key";
    }) config.networking.wireguard.interfaces;
    networking.firewall.trustedInterfaces = lib.mkIf config.networking.firewall.enable [ "lo" ];
    systemd.services = {
      # What of theirs meets what the module says.
      nix-gc = lib.mkIf config.nix.enable {
        description = "Nix Garbage Collector";
        restartIfChanged = false;
        serviceConfig.Type = "oneshot";
      };
      sshd = lib.mkIf (config.services.openssh.enable && !config.services.openssh.startWhenNeeded) {
        after = [
          "network.target"
          "sshd-keygen.service"
        ];
        stopIfChanged = false;
        serviceConfig.Restart = "always";
      };
    };
    networking.firewall.allowedTCPPorts = lib.mkIf (
      config.services.openssh.enable && config.services.openssh.openFirewall
    ) config.services.openssh.ports;
    # NixOS clears its NAT by these, also where there is none.
    networking.firewall.extraCommands = lib.mkIf (!config.networking.nftables.enable) ''
      ip46tables() {
        iptables -w "$@"
        ip6tables -w "$@"
      }
      ip46tables -w -t nat -D PREROUTING -j nixos-nat-pre 2>/dev/null || true
      ip46tables -w -t nat -D OUTPUT -j nixos-nat-out 2>/dev/null || true
      ip46tables -w -D FORWARD -j nixos-filter-forward 2>/dev/null || true
    '';
    networking.nftables.flushRuleset = lib.mkIf config.networking.nftables.enable (
      lib.mkDefault (
        builtins.compareVersions config.system.stateVersion "23.11" < 0
        || config.networking.nftables.rulesetFile != null
        || config.networking.nftables.ruleset != ""
      )
    );
  };
}
