# What contradicts the policy is an error of the evaluation; what is unwise, a warning.
{ config, lib, ... }:
let
  cfg = config.services.spokeguard;
  policy = cfg.settings;
  inherit (policy)
    enforce
    mesh
    metrics
    public
    ssh
    ;
  net = import ./addresses.nix { inherit lib; };
  inherit (config.networking) firewall nftables;
  inherit (config.services) openssh;

  # An error, where the contradiction is there.
  unless = contradiction: words: {
    assertion = !contradiction;
    message = lib.concatStringsSep " " words;
  };
  warn = unwise: words: lib.optional unwise (lib.concatStringsSep " " words);
  # Not looked at where the condition does not hold.
  only = lib.optionals;
  isNetwork = unit: lib.hasPrefix "network" unit && lib.hasSuffix ".target" unit;
  shown = lib.concatMapStringsSep ", " toString;
  isHub = policy.node.role == "hub";
  overWireguard = mesh.kind == "wireguard";

  sshAddresses = if ssh.bind == "mesh" then mesh.address else ssh.bind;
  bare = address: lib.removeSuffix "]" (lib.removePrefix "[" address);
  strayAddresses = lib.subtractLists sshAddresses (
    map (listen: bare (toString listen.addr)) openssh.listenAddresses
  );
  # One without a port listens on openssh.ports, which has an error of its own.
  strayListens = lib.filter (
    listen:
    builtins.elem (bare (toString listen.addr)) sshAddresses
    && listen.port != null
    && listen.port != ssh.port
  ) openssh.listenAddresses;
  refusesBinds = enforce.binds && enforce.mode == "enforce";

  # What the firewall lets everybody reach on an interface that is neither the mesh nor local.
  isPublic =
    interface:
    let
      name = builtins.replaceStrings [ "+" ] [ "*" ] interface;
    in
    name != mesh.interface
    && !(lib.any (network: lib.any (covers name) network.interfaces) policy.local);
  covers = coversBy "*";
  coversBy =
    wild: name: pattern:
    name == pattern || lib.hasSuffix wild pattern && lib.hasPrefix (lib.removeSuffix wild pattern) name;
  publicInterfaces = lib.filterAttrs (name: _: isPublic name) firewall.interfaces;
  gates = [ firewall ] ++ lib.attrValues publicInterfaces;
  openTo = proto: lib.concatMap (opening: opening.${proto}) (net.openings policy);
  allowed = {
    # What openFirewall opens has an error of its own.
    tcp = public.tcp ++ openTo "tcp" ++ lib.optionals openssh.openFirewall openssh.ports;
    udp = public.udp ++ openTo "udp" ++ lib.optional (mesh.listen_port != null) mesh.listen_port;
  };
  stray =
    gate: proto:
    let
      allowedHere = "allowed${if proto == "tcp" then "TCP" else "UDP"}";
      ports = gate."${allowedHere}Ports";
      ranges = gate."${allowedHere}PortRanges";
      named = range: lib.count (port: port >= range.from && port <= range.to) (lib.unique allowed.${proto});
      isStray = range: named range < range.to - range.from + 1;
    in
    lib.unique (
      map toString (lib.subtractLists allowed.${proto} ports)
      ++ map (range: "${toString range.from}-${toString range.to}") (lib.filter isStray ranges)
    );
  strayTo =
    option: to: gate: proto: advice:
    let
      ports = stray gate proto;
    in
    unless (ports != [ ]) ([ "networking.firewall${option} opens ${proto} ${shown ports}${to}," ] ++ advice);
  strayOn =
    name: gate:
    let
      interface = builtins.replaceStrings [ "+" ] [ "*" ] name;
      advice = proto: [
        "and ${interface} is public by the policy, whose settings.public.${proto} does not:"
        "name a LAN or a bridge of containers in settings.local, with its ports;"
        "else name the port there, or remove it here"
      ];
      on = proto: strayTo ".interfaces.\"${name}\"" "" gate proto (advice proto);
    in
    [
      (on "tcp")
      (on "udp")
    ];
  # Those of the ports that no gate lets in, alone or within a range.
  shut =
    proto: gates:
    lib.filter (
      port:
      !(lib.any (
        gate:
        builtins.elem port gate."allowed${proto}Ports"
        || lib.any (range: range.from <= port && port <= range.to) gate."allowed${proto}PortRanges"
      ) gates)
    );
  shutPorts = shut "TCP" gates public.tcp ++ shut "UDP" gates public.udp;
  trustedPublic = lib.filter (name: name != "lo" && isPublic name) firewall.trustedInterfaces;

  # What has to get through or the host is out of reach: our trial takes our own table back, never
  # the rules of networking.firewall. Here is what those drop of it.
  coversMesh = coversBy (if usesIptables then "+" else "*") mesh.interface;
  meshGates = [
    firewall
  ]
  ++ lib.attrValues (lib.filterAttrs (name: _: coversMesh name) firewall.interfaces);
  sshOutside = lib.subtractLists mesh.address sshAddresses;
  # Without mesh.address (Tailscale) they may well be there.
  sshOnMesh = ssh.bind == "mesh" || mesh.address == [ ] || sshOutside != sshAddresses;
  dropped = lib.filter (way: way.ports != [ ]) [
    rec {
      ports = lib.optionals (!(lib.any coversMesh firewall.trustedInterfaces)) (
        shut "TCP" meshGates (lib.optional sshOnMesh ssh.port ++ [ metrics.port ])
      );
      what = "tcp ${shown ports} on ${mesh.interface}";
      option = "interfaces.\"${mesh.interface}\".allowedTCPPorts";
    }
    rec {
      # Where sshd is on the mesh as well, that is a way in.
      ports = lib.optionals (trustedPublic == [ ] && net.isOutside ssh && !sshOnMesh) (
        shut "TCP" gates [ ssh.port ]
      );
      what = "tcp ${shown ports} on ${shown sshAddresses}";
      option = "allowedTCPPorts";
    }
    rec {
      ports = lib.optionals (trustedPublic == [ ] && mesh.listen_port != null) (
        shut "UDP" gates [ mesh.listen_port ]
      );
      what = "udp ${shown ports} of the tunnel";
      option = "allowedUDPPorts";
    }
  ];
  toOpen =
    way:
    "write networking.firewall.${way.option} = [ ${lib.concatMapStringsSep " " toString way.ports} ]"
    + lib.optionalString (!cfg.manageFirewall) ", or set manageFirewall = true";
  # Who else may let it in, by rules that are not read here. NixOS itself always has commands in
  # extraCommands, which clear its NAT: those that matter name a chain of what comes in, or a file.
  backend = net.firewallBackend config.networking;
  usesFirewalld = backend == "firewalld";
  usesIptables = backend == "iptables";
  unread =
    lib.optional usesFirewalld "services.firewalld"
    ++ lib.optional (
      backend == "nftables" && firewall.extraInputRules != ""
    ) "networking.firewall.extraInputRules"
    ++ lib.optional (
      usesIptables
      && lib.any (word: lib.hasInfix word firewall.extraCommands) [
        "INPUT"
        "nixos-fw"
        "restore"
        builtins.storeDir
      ]
    ) "networking.firewall.extraCommands"
    # Its rules come first there; nftables' tables are apart, and what one of them drops is gone.
    ++ lib.optional (usesIptables && !overWireguard) "tailscaled";

  made =
    config.networking.wireguard.interfaces.${mesh.interface}
      or config.networking.wg-quick.interfaces.${mesh.interface} or null;
  # A file says what is not read here.
  declared = if made.configFile or null == null then made else null;
  declaredAddresses = map net.address (declared.ips or declared.address or [ ]);
  keepalive = net.seconds mesh.keepalive;
  otherKeepalives = lib.remove keepalive (map (peer: peer.persistentKeepalive) declared.peers);
  hubKey = if mesh.hub == null then null else mesh.hub.public_key;

  storedSecrets = lib.filterAttrs (_: file: file != null && lib.hasPrefix builtins.storeDir file) {
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
          (unless (mesh.address == [ ]) [
            "settings.mesh.address is empty: write this node's address in the mesh"
          ])
          (unless (mesh.prefix == null) [
            "settings.mesh.prefix is missing: write the mesh's network, such as [ \"10.84.0.0/24\" ]"
          ])
        ]
        ++ only (overWireguard && declared != null) [
          (unless (lib.subtractLists declaredAddresses mesh.address != [ ]) [
            "networking says that ${mesh.interface} has ${shown declaredAddresses},"
            "and settings.mesh.address is ${shown mesh.address}: write the same in both"
          ])
          (unless (mesh.listen_port != null && declared.listenPort != mesh.listen_port) [
            "${mesh.interface} listens on UDP ${toString declared.listenPort},"
            "and settings.mesh.listen_port is ${toString mesh.listen_port}: write the same in both"
          ])
          (unless (keepalive != null && otherKeepalives != [ ]) [
            "a peer of ${mesh.interface} has persistentKeepalive = ${shown otherKeepalives},"
            "and settings.mesh.keepalive is ${toString mesh.keepalive}: leave persistentKeepalive out"
          ])
          (unless (!isHub && hubKey != null && !(lib.any (peer: peer.publicKey == hubKey) declared.peers)) [
            "no peer of ${mesh.interface} has the public key of settings.mesh.hub"
          ])
        ]
        ++ only (overWireguard && cfg.wireguard.privateKeyFile != null && !isHub) [
          (unless (hubKey == null || mesh.hub.endpoint == null) [
            "wireguard.privateKeyFile makes ${mesh.interface},"
            "which needs settings.mesh.hub with its public_key and endpoint"
          ])
        ]

        # sshd.
        ++ only openssh.enable [
          (unless (openssh.openFirewall && !(net.isOutside ssh)) [
            "services.openssh.openFirewall is true and opens tcp ${shown openssh.ports} on every interface,"
            "and the policy has sshd for the mesh: set it to false"
          ])
          (unless (openssh.ports != [ ssh.port ]) [
            "services.openssh.ports is ${shown openssh.ports},"
            "and settings.ssh.port is ${toString ssh.port}: write the same in both"
          ])
          (unless (strayAddresses != [ ]) [
            "services.openssh.listenAddresses has ${shown strayAddresses}, which settings.ssh.bind does not:"
            "name the address there, or remove it here"
          ])
          (unless (strayListens != [ ]) [
            "services.openssh.listenAddresses has"
            "${lib.concatMapStringsSep ", " (listen: "${listen.addr}:${toString listen.port}") strayListens},"
            "and settings.ssh.port is ${toString ssh.port}: write the same in both"
          ])
          (unless (openssh.listenAddresses == [ ] && !ssh.rebind && refusesBinds) [
            "sshd would listen on every address, and its binds are refused:"
            "name its addresses in settings.mesh.address, or set settings.ssh.rebind = true"
          ])
        ]

        # The firewall.
        ++ only firewall.enable (
          map
            (
              proto:
              strayTo "" " to everyone" firewall proto [
                "and settings.public.${proto} does not: name it there, or remove it here"
              ]
            )
            [
              "tcp"
              "udp"
            ]
          ++ builtins.concatLists (lib.mapAttrsToList strayOn publicInterfaces)
        )
        ++ only (firewall.enable && unread == [ ]) (
          map (
            way:
            unless true [
              "networking.firewall drops ${way.what}, which the policy lets in:"
              (toOpen way)
            ]
          ) dropped
        )
        ++ [
          (unless (firewall.enable && cfg.manageFirewall && usesFirewalld) [
            "services.firewalld is the host's firewall, whose zones the module does not set up:"
            "set manageFirewall = false and open there what the policy names, or set it to false"
          ])
        ]
        ++ only nftables.enable [
          (unless nftables.flushRuleset [
            "networking.nftables.flushRuleset takes table inet spokeguard away at every rebuild:"
            "put your rules into networking.nftables.tables, and set it to false"
          ])
          (unless (lib.any isNetwork (config.systemd.services.nftables or { }).after or [ ]) [
            "systemd.services.nftables starts after the network, and the boot unit has to start between"
            "the two, so that systemd would leave one out: take the network out of its after"
          ])
          (unless (nftables.tables ? spokeguard) [
            "networking.nftables.tables.spokeguard has the name of spokeguard's own table: choose another"
          ])
        ]

        # Secrets and roles.
        ++ map (
          name:
          unless true [
            "${name} is in the Nix store, which everybody can read:"
            "write a path outside of it, as a string"
          ]
        ) (builtins.attrNames storedSecrets)
        ++ only (cfg.profile != null) [
          (unless (cfg.profile != policy.node.role) [
            "profile is \"${cfg.profile}\", and settings.node.role is \"${policy.node.role}\":"
            "write the same in both"
          ])
        ]
        ++ [
          (unless (cfg.hub.spokes != { } && !isHub) [
            "hub.spokes are for the hub, and settings.node.role is \"${policy.node.role}\""
          ])
          (unless (twice addresses != [ ]) [
            "hub.spokes: the address ${shown (twice addresses)} is there twice"
          ])
          (unless (twice keys != [ ]) [
            "hub.spokes: the public key ${shown (twice keys)} is there twice"
          ])
        ]
      );

    warnings = map (text: "services.spokeguard: ${text}") (
      warn (cfg.checkPolicy && cfg.checkPackage == null) [
        "the policy is not checked by the build, whose machine has no spokeguard to run:"
        "set checkPackage to one for that machine, or checkPolicy = false"
      ]
      ++ warn (!firewall.enable) [
        "networking.firewall is off: nothing holds this host but spokeguard"
      ]
      ++ warn (firewall.enable && shutPorts != [ ]) [
        "the policy has ${shown shutPorts} public, and networking.firewall does not open it"
      ]
      ++ lib.concatMap (
        way:
        warn (firewall.enable && unread != [ ]) [
          "networking.firewall does not name ${way.what}, which the policy lets in,"
          "and the rules of ${shown unread} are not read here: see that they do, or"
          (toOpen way)
        ]
      ) dropped
      ++ warn (!openssh.enable && mesh.tailscale_ssh != true) [
        "services.openssh is off, and the policy has sshd on tcp ${toString ssh.port}:"
        "set services.openssh.enable = true, or nobody gets in but by an sshd of your own"
      ]
      ++ warn (enforce.mode == "audit") [
        "enforce.mode is \"audit\": it counts, and drops nothing"
      ]
      ++ warn (!enforce.firewall) [
        "enforce.firewall is false: it looks on, and holds nothing"
      ]
      ++ warn enforce.allow_no_admin_path [
        "enforce.allow_no_admin_path: this node may end up without a way in"
      ]
      ++ warn (overWireguard && !isHub && keepalive == null) [
        "mesh.keepalive is off: behind NAT the hub can't reach this node, once it is silent"
      ]
      ++ warn (overWireguard && made == null && !config.systemd.network.enable) [
        "nothing declares the interface ${mesh.interface}:"
        "set wireguard.privateKeyFile, or make it yourself"
      ]
      ++ warn (!overWireguard && !config.services.tailscale.enable) [
        "mesh.kind is \"tailscale\", and services.tailscale is off"
      ]
      ++ warn (openssh.enable && openssh.settings.PasswordAuthentication != false) [
        "sshd takes passwords (services.openssh.settings.PasswordAuthentication)"
      ]
      ++ warn (overWireguard && mesh.hub != null && hubKey == null) [
        "mesh.hub.public_key is missing: another peer in its place would not be noticed"
      ]
      ++ warn (trustedPublic != [ ]) [
        "networking.firewall.trustedInterfaces trusts ${shown trustedPublic}, which is public by the policy"
      ]
    );
  };
}
