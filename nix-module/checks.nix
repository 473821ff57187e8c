# What contradicts the policy is an error of the evaluation; what is unwise, a warning.
{ config, lib, ... }:
let
  cfg = config.services.spokeguard;
  policy = cfg.settings;
  inherit (policy)
    enforce
    exception
    mesh
    public
    ssh
    ;
  net = import ./addresses.nix { inherit lib; };
  inherit (config.networking) firewall nftables;
  inherit (config.services) openssh;

  unless = message: assertion: { inherit assertion message; };
  only = condition: list: if condition then list else [ ];
  shown = lib.concatMapStringsSep ", " toString;
  isHub = policy.node.role == "hub";
  overWireguard = mesh.kind == "wireguard";

  sshAddresses = if ssh.bind == "mesh" then mesh.address else ssh.bind;
  sshdAddresses = map (listen: lib.removeSuffix "]" (lib.removePrefix "[" (toString listen.addr))) openssh.listenAddresses;
  strayAddresses = lib.subtractLists sshAddresses sshdAddresses;

  # What the firewall lets everybody reach on an interface that is neither the mesh nor local.
  isPublic =
    name:
    name != mesh.interface
    && !(lib.any (network: lib.any (covers name) network.interfaces) policy.local);
  covers =
    name: pattern:
    name == pattern || lib.hasSuffix "*" pattern && lib.hasPrefix (lib.removeSuffix "*" pattern) name;
  gates = [ firewall ] ++ lib.attrValues (lib.filterAttrs (name: _: isPublic name) firewall.interfaces);
  holes = proto: lib.concatMap (hole: hole.${proto}) exception;
  allowed = {
    # What openFirewall opens has an error of its own.
    tcp = public.tcp ++ holes "tcp" ++ lib.optionals openssh.openFirewall openssh.ports;
    udp = public.udp ++ holes "udp" ++ lib.optional (mesh.listen_port != null) mesh.listen_port;
  };
  stray =
    proto: ports: ranges:
    let
      isStray = range: lib.length (lib.filter (port: port >= range.from && port <= range.to) (lib.unique allowed.${proto})) < range.to - range.from + 1;
    in
    lib.unique (
      map toString (lib.subtractLists allowed.${proto} (lib.concatMap (gate: gate.${ports}) gates))
      ++ map (range: "${toString range.from}-${toString range.to}") (
        lib.filter isStray (lib.concatMap (gate: gate.${ranges}) gates)
      )
    );
  strayTcp = stray "tcp" "allowedTCPPorts" "allowedTCPPortRanges";
  strayUdp = stray "udp" "allowedUDPPorts" "allowedUDPPortRanges";
  shutTcp = lib.subtractLists (lib.concatMap (gate: gate.allowedTCPPorts) gates) public.tcp;
  shutUdp = lib.subtractLists (lib.concatMap (gate: gate.allowedUDPPorts) gates) public.udp;

  declared =
    config.networking.wireguard.interfaces.${mesh.interface}
      or config.networking.wg-quick.interfaces.${mesh.interface} or null;
  declaredAddresses = map net.address (declared.ips or declared.address or [ ]);
  keepalive = net.seconds mesh.keepalive;
  otherKeepalive = lib.filter (peer: peer.persistentKeepalive != keepalive) declared.peers;

  secrets = lib.filterAttrs (_: file: file != null && lib.hasPrefix builtins.storeDir file) {
    inherit (cfg) kumaUrlFile ntfyUrlFile;
    "wireguard.privateKeyFile" = cfg.wireguard.privateKeyFile;
  };
  spokes = lib.attrValues cfg.hub.spokes;
  addresses = lib.concatMap (spoke: spoke.address) spokes ++ mesh.address;
  keys = map (spoke: spoke.publicKey) spokes;
  twice = list: lib.unique (lib.filter (x: lib.count (y: x == y) list > 1) list);
in
{
  config = lib.mkIf cfg.enable {
    assertions =
      map (entry: entry // { message = "services.spokeguard: ${entry.message}"; }) (
        # The mesh.
        only overWireguard [
          (unless "settings.mesh.address is empty: write this node's address in the mesh" (mesh.address != [ ]))
          (unless "settings.mesh.prefix is missing: write the mesh's network, such as [ \"10.84.0.0/24\" ]" (
            mesh.prefix != null
          ))
        ]
        ++ only (overWireguard && declared != null) [
          (unless "networking says that ${mesh.interface} has ${shown declaredAddresses}, and settings.mesh.address is ${shown mesh.address}: write the same in both" (
            lib.subtractLists declaredAddresses mesh.address == [ ]
          ))
          (unless "${mesh.interface} listens on UDP ${toString declared.listenPort}, and settings.mesh.listen_port is ${toString mesh.listen_port}: write the same in both" (
            mesh.listen_port == null || declared.listenPort == mesh.listen_port
          ))
          (unless "a peer of ${mesh.interface} has persistentKeepalive = ${
            toString (map (peer: peer.persistentKeepalive) otherKeepalive)
          }, and settings.mesh.keepalive is ${toString mesh.keepalive}: leave persistentKeepalive out" (
            keepalive == null || otherKeepalive == [ ]
          ))
          (unless "no peer of ${mesh.interface} has the public key of settings.mesh.hub" (
            isHub
            || mesh.hub == null
            || mesh.hub.public_key == null
            || lib.any (peer: peer.publicKey == mesh.hub.public_key) declared.peers
          ))
        ]
        ++ only (overWireguard && cfg.wireguard.privateKeyFile != null && !isHub) [
          (unless "wireguard.privateKeyFile makes ${mesh.interface}, which needs settings.mesh.hub with its public_key and endpoint" (
            mesh.hub != null && mesh.hub.public_key != null && mesh.hub.endpoint != null
          ))
        ]

        # sshd.
        ++ only openssh.enable [
          (unless "services.openssh.openFirewall is true and opens tcp ${shown openssh.ports} on every interface, and the policy has sshd for the mesh: set it to false" (
            !openssh.openFirewall
          ))
          (unless "services.openssh.ports is ${shown openssh.ports}, and settings.ssh.port is ${toString ssh.port}: write the same in both" (
            openssh.ports == [ ssh.port ]
          ))
          (unless "services.openssh.listenAddresses has ${shown strayAddresses}, which settings.ssh.bind does not: name the address there, or remove it here" (
            strayAddresses == [ ]
          ))
          (unless "sshd would listen on every address, and its binds are refused: name its addresses in settings.mesh.address, or set settings.ssh.rebind = true" (
            openssh.listenAddresses != [ ] || ssh.rebind || !enforce.binds || enforce.mode == "audit"
          ))
        ]

        # The firewall.
        ++ only firewall.enable [
          (unless "networking.firewall opens tcp ${shown strayTcp} to everyone, and settings.public.tcp does not: name it there, or remove it here" (
            strayTcp == [ ]
          ))
          (unless "networking.firewall opens udp ${shown strayUdp} to everyone, and settings.public.udp does not: name it there, or remove it here" (
            strayUdp == [ ]
          ))
        ]
        ++ only nftables.enable [
          (unless "networking.nftables.flushRuleset takes table inet spokeguard away at every rebuild: put your rules into networking.nftables.tables, and set it to false" (
            !nftables.flushRuleset
          ))
          (unless "networking.nftables.tables.spokeguard has the name of spokeguard's own table: choose another" (
            !(nftables.tables ? spokeguard)
          ))
        ]

        # Secrets and roles.
        ++ lib.mapAttrsToList (
          name: _: unless "${name} is in the Nix store, which everybody can read: write a path outside of it, as a string" false
        ) secrets
        ++ only (cfg.profile != null) [
          (unless "profile is \"${cfg.profile}\", and settings.node.role is \"${policy.node.role}\": write the same in both" (
            cfg.profile == policy.node.role
          ))
        ]
        ++ [
          (unless "hub.spokes are for the hub, and settings.node.role is \"${policy.node.role}\"" (
            cfg.hub.spokes == { } || isHub
          ))
          (unless "hub.spokes: the address ${shown (twice addresses)} is there twice" (twice addresses == [ ]))
          (unless "hub.spokes: the public key ${shown (twice keys)} is there twice" (twice keys == [ ]))
        ]
      );

    warnings =
      map (text: "services.spokeguard: ${text}") (
        lib.optional (!firewall.enable) "networking.firewall is off: nothing holds this host but spokeguard"
        ++ lib.optional (firewall.enable && shutTcp ++ shutUdp != [ ]) (
          "the policy has ${shown (shutTcp ++ shutUdp)} public, and networking.firewall does not open it"
        )
        ++ lib.optional (enforce.mode == "audit") "enforce.mode is \"audit\": it counts, and drops nothing"
        ++ lib.optional (!enforce.firewall) "enforce.firewall is false: it looks on, and holds nothing"
        ++ lib.optional enforce.allow_no_admin_path "enforce.allow_no_admin_path: this node may end up without a way in"
        ++ lib.optional (overWireguard && !isHub && keepalive == null) (
          "mesh.keepalive is off: behind NAT the hub can't reach this node, once it is silent"
        )
        ++ lib.optional (overWireguard && declared == null && !config.systemd.network.enable) (
          "nothing declares the interface ${mesh.interface}: set wireguard.privateKeyFile, or make it yourself"
        )
        ++ lib.optional (!overWireguard && !config.services.tailscale.enable) (
          "mesh.kind is \"tailscale\", and services.tailscale is off"
        )
        ++ lib.optional (openssh.enable && openssh.settings.PasswordAuthentication != false) (
          "sshd takes passwords (services.openssh.settings.PasswordAuthentication)"
        )
        ++ lib.optional (overWireguard && mesh.hub != null && mesh.hub.public_key == null) (
          "mesh.hub.public_key is missing: another peer in its place would not be noticed"
        )
        ++ lib.optional (lib.any isPublic (lib.remove "lo" firewall.trustedInterfaces)) (
          "networking.firewall.trustedInterfaces trusts ${
            shown (lib.filter isPublic (lib.remove "lo" firewall.trustedInterfaces))
          }, which is public by the policy"
        )
      );
  };
}
