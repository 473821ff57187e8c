# The host that the policy speaks of: sshd, the firewall and the tunnel, set up to agree with it.
{ config, lib, ... }:
let
  inherit (lib) mkDefault mkIf mkOption;
  inherit (lib.types) attrsOf listOf submodule;
  cfg = config.services.spokeguard;
  inherit (cfg.settings)
    local
    mesh
    metrics
    public
    ssh
    ;
  net = import ./addresses.nix { inherit lib; };

  sshAddresses = if ssh.bind == "mesh" then mesh.address else ssh.bind;
  open = tcp: udp: {
    allowedTCPPorts = tcp;
    allowedUDPPorts = udp;
  };
  byNftables = net.firewallBackend config.networking == "nftables";
  # iptables has a plus where nftables and the policy have a star.
  on = ports: pattern: {
    interfaces.${if byNftables then pattern else builtins.replaceStrings [ "*" ] [ "+" ] pattern} =
      open ports.tcp ports.udp;
  };
  keepalive = net.seconds mesh.keepalive;
  hubKey = if mesh.hub == null then null else mesh.hub.public_key;
  tunnel = lib.optional (mesh.listen_port != null) mesh.listen_port;
  services = mesh.service;

  openings = net.openings cfg.settings;
  # One rule a prefix: nft refuses a set whose prefixes overlap.
  openingRules = lib.concatMapStrings (
    opening:
    let
      rule =
        prefix: proto: ports:
        lib.optionalString (ports != [ ]) ''
          ${if net.isV6 prefix then "ip6" else "ip"} saddr ${prefix} ${proto} dport { ${
            lib.concatMapStringsSep ", " toString ports
          } } accept comment "spokeguard: ${opening.name}"
        '';
    in
    lib.concatMapStrings (
      prefix: rule prefix "tcp" opening.tcp + rule prefix "udp" opening.udp
    ) opening.from
  ) openings;

  # Peers that somebody else declares get the policy's keepalive, unless they have one.
  peersKeptAlive =
    { name, ... }:
    {
      options.peers = mkOption {
        type = listOf (submodule {
          config = mkIf (cfg.enable && cfg.manageWireguard && name == mesh.interface && keepalive != null) {
            persistentKeepalive = mkDefault keepalive;
          };
        });
      };
    };
in
{
  options.networking.wireguard.interfaces = mkOption { type = attrsOf (submodule peersKeptAlive); };
  options.networking.wg-quick.interfaces = mkOption { type = attrsOf (submodule peersKeptAlive); };

  config = mkIf cfg.enable {
    services.openssh = mkIf cfg.manageOpenssh {
      enable = mkDefault true;
      # Its default opens the port on every interface, wherever sshd listens.
      openFirewall = mkDefault false;
      ports = mkDefault [ ssh.port ];
      listenAddresses = map (address: {
        addr = net.bracketed address;
        inherit (ssh) port;
      }) sshAddresses;
      settings.PasswordAuthentication = mkDefault false;
      settings.KbdInteractiveAuthentication = mkDefault false;
    };

    networking.nftables = mkIf cfg.manageFirewall {
      enable = mkDefault true;
      # NixOS before 23.11 flushed, and with it went our table. Stronger than its default, weaker
      # than what somebody writes; rules of their own may depend on being flushed.
      flushRuleset = mkIf (
        config.networking.nftables.ruleset == "" && config.networking.nftables.rulesetFile == null
      ) (lib.mkOverride 900 false);
    };
    networking.firewall = mkIf cfg.manageFirewall (
      lib.mkMerge (
        [
          (open [ ] tunnel)
          {
            interfaces.${mesh.interface} = open (
              [
                ssh.port
                metrics.port
              ]
              ++ lib.concatMap (service: service.tcp) services
            ) (lib.concatMap (service: service.udp) services);
          }
          # Where these rules can't name a source, spokeguard still does; an exception's day it alone knows.
          (mkIf byNftables { extraInputRules = openingRules; })
          (mkIf (!byNftables) (
            open (lib.concatMap (opening: opening.tcp) openings) (
              lib.concatMap (opening: opening.udp) openings
            )
          ))
        ]
        ++ (
          if public.interfaces == null then
            [ (open public.tcp public.udp) ]
          else
            map (on public) public.interfaces
        )
        ++ lib.concatMap (network: map (on network) network.interfaces) local
      )
    );

    networking.wireguard.interfaces =
      mkIf (cfg.manageWireguard && cfg.wireguard.privateKeyFile != null && mesh.kind == "wireguard")
        {
          ${mesh.interface} = {
            # The route to the others comes with their allowed addresses.
            ips = map net.alone mesh.address;
            inherit (cfg.wireguard) privateKeyFile;
            listenPort = mkIf (mesh.listen_port != null) mesh.listen_port;
            peers =
              lib.optional (cfg.settings.node.role != "hub" && hubKey != null) {
                name = "hub";
                publicKey = hubKey;
                inherit (mesh.hub) endpoint;
                allowedIPs = if mesh.prefix == null then [ ] else mesh.prefix;
              }
              ++ lib.mapAttrsToList (name: spoke: {
                inherit name;
                inherit (spoke) publicKey;
                allowedIPs = map net.alone spoke.address;
              }) cfg.hub.spokes;
          };
        };
  };
}
