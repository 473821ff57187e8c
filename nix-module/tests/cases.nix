# Hosts that are right, contradict themselves or are unwise. Each is the spoke below and a module.
{ lib }:
let
  key = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg=";
  other = "4ZgJs9GrzJw8bJvZWhT17fec1pYzW27an2YCZ8HE+Ec=";
  say = lib.concatStringsSep " ";
  mesh = more: { services.spokeguard.settings.mesh = more; };
  settings = more: { services.spokeguard.settings = more; };
  peer = more: {
    networking.wireguard.interfaces.wg0 = {
      ips = lib.mkForce [ "10.84.0.16/24" ];
      peers = lib.mkForce [ ({ publicKey = key; } // more) ];
    };
  };
  # A firewall of one's own: what is public, and what `more` says.
  ownFirewall = more: {
    imports = [ more ];
    services.spokeguard.manageFirewall = false;
    networking.firewall.allowedTCPPorts = [
      80
      443
    ];
  };
  onMesh = more: ownFirewall { networking.firewall.interfaces.wg0 = more; };
  range = from: to: { inherit from to; };
  # sshd of one's own, with one address to listen on.
  ownSshd = listen: {
    services.spokeguard.manageOpenssh = false;
    services.openssh.enable = true;
    services.openssh.openFirewall = false;
    services.openssh.settings.PasswordAuthentication = false;
    services.openssh.listenAddresses = [ listen ];
  };
  shutOut =
    ports: where: option:
    say [
      "networking.firewall drops ${ports} ${where}, which the policy lets in: write"
      "networking.firewall.${option}, or set manageFirewall = true"
    ];
  shutOutOfTheMesh =
    shutOut "tcp 22, 9984" "on wg0"
      "interfaces.\"wg0\".allowedTCPPorts = [ 22 9984 ]";
  shutOutOfTailscale =
    shutOut "tcp 22, 9984" "on tailscale0"
      "interfaces.\"tailscale0\".allowedTCPPorts = [ 22 9984 ]";
  opensOn =
    option: interface: ports: proto:
    say [
      "networking.firewall.interfaces.\"${option}\" opens ${ports}, and ${interface} is public by the policy,"
      "whose settings.public.${proto} does not: name a LAN or a bridge of containers in settings.local, with"
      "its ports; else name the port there, or remove it here"
    ];
  containersAndException = {
    services.spokeguard.settings.local = [
      {
        name = "containers";
        interfaces = [ "docker*" ];
        udp = [ 53 ];
      }
    ];
    services.spokeguard.settings.exception = [
      {
        name = "emergency-ssh";
        tcp = [ 2222 ];
        from = [ "198.51.100.0/24" ];
        reason = "way in when the mesh is down";
        until = "2099-01-31";
      }
    ];
  };
  notRead =
    rules:
    say [
      "networking.firewall does not name tcp 22, 9984 on wg0, which the policy lets in, and the rules of"
      "${rules} are not read here: see that they do, or write"
      "networking.firewall.interfaces.\"wg0\".allowedTCPPorts = [ 22 9984 ], or set manageFirewall = true"
    ];
  hubWithOwnFirewall = more: {
    imports = [
      (onMesh { allowedTCPPortRanges = [ (range 1 65535) ]; })
      more
    ];
    services.spokeguard.profile = "hub";
    services.spokeguard.settings.mesh.hub = lib.mkForce null;
    services.spokeguard.settings.ssh.from = lib.mkOverride 900 "mesh";
  };
  sshOutside = bind: {
    services.spokeguard.settings.ssh = {
      inherit bind;
      from = [
        "10.84.0.1/32"
        "198.51.100.0/24"
      ];
    };
  };
  commands = text: {
    module = ownFirewall { networking.firewall.extraCommands = text; };
    warnings = [ (notRead "networking.firewall.extraCommands") ];
  };
  noFirewall = "networking.firewall is off: nothing holds this host but spokeguard";
  noSshd = say [
    "services.openssh is off, and the policy has sshd on tcp 22: set services.openssh.enable = true, or"
    "nobody gets in but by an sshd of your own"
  ];
  tailscale = {
    services.tailscale.enable = true;
    services.spokeguard.wireguard.privateKeyFile = null;
    services.spokeguard.settings = {
      mesh.kind = "tailscale";
      mesh.address = [ ];
      mesh.prefix = null;
      mesh.hub = lib.mkForce null;
      ssh.from = "mesh";
      ssh.rebind = true;
    };
  };
in
{
  spoke = {
    services.spokeguard = {
      enable = true;
      wireguard.privateKeyFile = lib.mkOverride 900 "/etc/wireguard/key";
      settings = {
        node.name = "singapore";
        mesh.address = lib.mkOverride 900 [ "10.84.0.16" ];
        mesh.prefix = lib.mkOverride 900 [ "10.84.0.0/24" ];
        mesh.hub.address = "10.84.0.1";
        mesh.hub.public_key = lib.mkOverride 900 key;
        mesh.hub.endpoint = "203.0.113.47:51820";
        public.tcp = [
          80
          443
        ];
      };
    };
  };

  cases = {
    # Right, as far as the module can tell.
    plain.module = { };
    peers-of-others.module = peer { };
    wg-quick.module = {
      services.spokeguard.wireguard.privateKeyFile = null;
      networking.wg-quick.interfaces.wg0 = {
        address = [ "10.84.0.16/24" ];
        peers = [ { publicKey = key; } ];
      };
      networking.wg-quick.interfaces.wg1.peers = [ { publicKey = other; } ];
    };
    wg-quick-by-a-file.module = {
      services.spokeguard.wireguard.privateKeyFile = null;
      networking.wg-quick.interfaces.wg0.configFile = "/etc/wireguard/wg0.conf";
    };
    both-families.module = mesh {
      address = [
        "10.84.0.16"
        "fd84::16"
      ];
      prefix = [
        "10.84.0.0/24"
        "fd84::/64"
      ];
    };
    by-interface.module = settings {
      public.interfaces = [ "eth0" ];
      local = [
        {
          name = "lan";
          interfaces = [
            "vmbr0"
            "docker*"
          ];
          tcp = [ 53 ];
          udp = [ 53 ];
        }
      ];
      mesh.service = [
        {
          name = "netdata";
          tcp = [ 19999 ];
        }
      ];
    };
    exception.module = settings {
      exception = [
        {
          name = "emergency-ssh";
          tcp = [ 2222 ];
          from = [
            "198.51.100.0/24"
            "2001:db8::/32"
          ];
          reason = "way in when the mesh is down";
          until = "2099-01-31";
        }
      ];
    };
    ssh-from-outside.module = {
      services.openssh.openFirewall = true;
      services.spokeguard.settings.ssh = {
        bind = [
          "10.84.0.16"
          "203.0.113.5"
        ];
        from = [
          "10.84.0.1/32"
          "198.51.100.0/24"
        ];
      };
    };
    iptables.module = containersAndException // {
      networking.nftables.enable = false;
    };
    # Nobody keeps the two from differing.
    iptables-by-backend.module = containersAndException // {
      networking.firewall.backend = "iptables";
    };
    sockets.module = {
      services.openssh.startWhenNeeded = true;
    };
    old-state-version.module = {
      system.stateVersion = "23.05";
    };
    nobody.module = settings { ssh.from = [ ]; };
    keys-of-later-versions.module = settings { ssh.later = "x"; };
    status-file.module = settings { heartbeat.status_file = "/srv/share/_status.json"; };
    urls.module = {
      services.spokeguard.kumaUrlFile = "/run/secrets/kuma";
      services.spokeguard.ntfyUrlFile = "/run/secrets/ntfy";
    };
    unmanaged.module = {
      imports = [
        (ownSshd { addr = "10.84.0.16"; })
        (ownFirewall { networking.firewall.trustedInterfaces = [ "wg0" ]; })
      ];
      services.spokeguard.manageWireguard = false;
      networking.wireguard.interfaces.wg0 = {
        ips = [ "10.84.0.16/24" ];
        privateKeyFile = "/etc/wireguard/key";
        peers = [
          {
            publicKey = key;
            persistentKeepalive = 25;
          }
        ];
      };
    };
    open-on-the-mesh.module = onMesh {
      allowedTCPPorts = [
        22
        9984
      ];
    };
    open-by-a-range.module = onMesh {
      allowedTCPPorts = [ 9984 ];
      allowedTCPPortRanges = [ (range 20 22) ];
    };
    # Addresses that the module does not know may be the mesh's.
    tailscale-by-address.module = ownFirewall {
      imports = [
        tailscale
        (sshOutside [ "100.64.0.5" ])
      ];
      services.spokeguard.settings.ssh.from = lib.mkForce [ "100.64.0.0/10" ];
      networking.firewall.trustedInterfaces = [ "tailscale0" ];
    };
    tailscale-by-address-shut = {
      module = ownFirewall {
        imports = [
          tailscale
          (sshOutside [ "100.64.0.5" ])
        ];
        services.spokeguard.settings.ssh.from = lib.mkForce [ "100.64.0.0/10" ];
        networking.nftables.enable = true;
      };
      errors = [ shutOutOfTailscale ];
    };
    # sshd is for others, too, and its port open to all.
    open-to-all.module = ownFirewall {
      imports = [
        (sshOutside [
          "10.84.0.16"
          "203.0.113.5"
        ])
      ];
      networking.firewall.allowedTCPPorts = [ 22 ];
      networking.firewall.interfaces.wg0.allowedTCPPorts = [ 9984 ];
    };
    open-outside.module = ownFirewall {
      imports = [ (sshOutside [ "203.0.113.5" ]) ];
      networking.firewall.allowedTCPPorts = [ 22 ];
      networking.firewall.interfaces.wg0.allowedTCPPorts = [ 9984 ];
    };
    # Its address in the mesh is not outside of it, whoever may come.
    open-to-the-mesh-alone.module = ownFirewall {
      imports = [ (sshOutside [ "10.84.0.16" ]) ];
      networking.firewall.trustedInterfaces = [ "wg0" ];
    };
    public-by-a-range.module = {
      services.spokeguard.manageFirewall = false;
      networking.firewall.allowedTCPPortRanges = [
        (range 80 80)
        (range 443 443)
      ];
      networking.firewall.trustedInterfaces = [ "wg0" ];
    };
    hub-with-its-own-firewall.module = hubWithOwnFirewall {
      networking.firewall.allowedUDPPorts = [ 51820 ];
    };
    tailscale.module = tailscale;

    without-nix.module = {
      nix.enable = false;
      services.spokeguard.profile = "spoke";
    };
    collected.module = {
      services.spokeguard.profile = "spoke";
      systemd.services.nix-gc.serviceConfig.ExecStartPre = [ "/another" ];
    };
    networkd.module = {
      networking.wireguard.useNetworkd = true;
    };

    # The mesh contradicts itself.
    no-mesh-address = {
      module = mesh { address = [ ]; };
      errors = [
        "settings.mesh.address is empty: write this node's address in the mesh"
        (say [
          "sshd would listen on every address, and its binds are refused: name its addresses in"
          "settings.mesh.address, or set settings.ssh.rebind = true"
        ])
      ];
    };
    no-mesh-prefix = {
      module = mesh { prefix = null; };
      errors = [
        "settings.mesh.prefix is missing: write the mesh's network, such as [ \"10.84.0.0/24\" ]"
      ];
    };
    another-address = {
      module = {
        networking.wireguard.interfaces.wg0.ips = lib.mkForce [ "10.84.0.99/24" ];
      };
      errors = [
        (say [
          "networking says that wg0 has 10.84.0.99, and settings.mesh.address is 10.84.0.16:"
          "write the same in both"
        ])
      ];
    };
    another-keepalive = {
      module = peer { persistentKeepalive = 10; };
      errors = [
        (say [
          "a peer of wg0 has persistentKeepalive = 10, and settings.mesh.keepalive is 25s: leave"
          "persistentKeepalive out"
        ])
      ];
    };
    another-hub = {
      module = mesh { hub.public_key = other; } // peer { };
      errors = [ "no peer of wg0 has the public key of settings.mesh.hub" ];
    };
    another-listen-port = {
      module = {
        services.spokeguard.settings.mesh.listen_port = 51820;
        networking.wireguard.interfaces.wg0.listenPort = lib.mkForce 51821;
      };
      errors = [
        "wg0 listens on UDP 51821, and settings.mesh.listen_port is 51820: write the same in both"
      ];
    };
    hub-without-key = {
      module = mesh { hub.public_key = null; };
      errors = [
        (say [
          "wireguard.privateKeyFile makes wg0, which needs settings.mesh.hub with its public_key"
          "and endpoint"
        ])
      ];
      warnings = [
        "mesh.hub.public_key is missing: another peer in its place would not be noticed"
      ];
    };

    file-and-settings = {
      module = {
        services.spokeguard = {
          policyFile = ../../examples/spoke.toml;
          settings.public.udp = [ 443 ];
        };
      };
      errors = [
        (say [
          "policyFile is used as it is, and settings, profile or a URL's file say more: write it"
          "into the file, or settings in its place"
        ])
      ];
    };

    # sshd does.
    ssh-for-everybody = {
      module = {
        services.openssh.openFirewall = true;
      };
      errors = [
        (say [
          "services.openssh.openFirewall is true and opens tcp 22 on every interface, and the"
          "policy has sshd for the mesh: set it to false"
        ])
      ];
    };
    another-ssh-port = {
      module = {
        services.openssh.ports = [ 2222 ];
      };
      errors = [
        "services.openssh.ports is 2222, and settings.ssh.port is 22: write the same in both"
      ];
    };
    ssh-elsewhere-too = {
      module = {
        services.openssh.listenAddresses = [
          {
            addr = "0.0.0.0";
            port = 22;
          }
        ];
      };
      errors = [
        (say [
          "services.openssh.listenAddresses has 0.0.0.0, which settings.ssh.bind does not: name"
          "the address there, or remove it here"
        ])
      ];
    };
    ssh-on-another-port = {
      module = ownSshd {
        addr = "10.84.0.16";
        port = 2222;
      };
      errors = [
        (say [
          "services.openssh.listenAddresses has 10.84.0.16:2222, and settings.ssh.port is 22: write"
          "the same in both"
        ])
      ];
    };
    ssh-elsewhere-on-another-port = {
      module = ownSshd {
        addr = "0.0.0.0";
        port = 2222;
      };
      errors = [
        (say [
          "services.openssh.listenAddresses has 0.0.0.0, which settings.ssh.bind does not: name"
          "the address there, or remove it here"
        ])
      ];
    };
    # One mistake, said once.
    ssh-on-another-port-of-all = {
      module = {
        imports = [ (ownSshd { addr = "10.84.0.16"; }) ];
        services.openssh.ports = [ 2222 ];
      };
      errors = [
        "services.openssh.ports is 2222, and settings.ssh.port is 22: write the same in both"
      ];
    };
    ssh-everywhere = {
      module = {
        services.spokeguard.manageOpenssh = false;
        services.openssh.enable = true;
        services.openssh.openFirewall = false;
        services.openssh.settings.PasswordAuthentication = false;
      };
      errors = [
        (say [
          "sshd would listen on every address, and its binds are refused: name its addresses in"
          "settings.mesh.address, or set settings.ssh.rebind = true"
        ])
      ];
    };

    # The firewall does.
    more-ports = {
      module = {
        networking.firewall.allowedTCPPorts = [ 8080 ];
        networking.firewall.interfaces.eth1.allowedUDPPorts = [ 5353 ];
      };
      errors = [
        (say [
          "networking.firewall opens tcp 8080 to everyone, and settings.public.tcp does not: name"
          "it there, or remove it here"
        ])
        (opensOn "eth1" "eth1" "udp 5353" "udp")
      ];
    };
    # As NixOS has it for podman's names.
    bridge-of-containers = {
      module.networking.firewall.interfaces."podman+".allowedUDPPorts = [ 53 ];
      errors = [ (opensOn "podman+" "podman*" "udp 53" "udp") ];
    };
    bridge-of-containers-named.module = {
      networking.firewall.interfaces.podman0.allowedUDPPorts = [ 53 ];
      services.spokeguard.settings.local = [
        {
          name = "containers";
          interfaces = [ "podman*" ];
          udp = [ 53 ];
        }
      ];
    };
    port-range = {
      module = {
        networking.firewall.allowedTCPPortRanges = [
          {
            from = 80;
            to = 80;
          }
          {
            from = 440;
            to = 443;
          }
        ];
      };
      errors = [
        (say [
          "networking.firewall opens tcp 440-443 to everyone, and settings.public.tcp does not:"
          "name it there, or remove it here"
        ])
      ];
    };
    shut-by-the-firewall = {
      module = {
        services.spokeguard.manageFirewall = false;
        networking.firewall.allowedTCPPorts = [ 80 ];
      };
      errors = [ shutOutOfTheMesh ];
      warnings = [
        "the policy has 443 public, and networking.firewall does not open it"
      ];
    };
    shut-metrics = {
      module = onMesh {
        allowedTCPPorts = [ 22 ];
        # Of another protocol, and next to it.
        allowedUDPPorts = [ 9984 ];
        allowedTCPPortRanges = [
          (range 9000 9983)
          (range 9985 9990)
        ];
      };
      errors = [ (shutOut "tcp 9984" "on wg0" "interfaces.\"wg0\".allowedTCPPorts = [ 9984 ]") ];
    };
    open-on-another-interface = {
      module = ownFirewall {
        services.spokeguard.settings.local = [
          {
            name = "lan";
            interfaces = [ "lan0" ];
          }
        ];
        networking.firewall.trustedInterfaces = [ "lan0" ];
        networking.firewall.interfaces.lan0.allowedTCPPorts = [ 22 ];
        networking.firewall.interfaces.wg0.allowedTCPPorts = [ 9984 ];
      };
      errors = [ (shutOut "tcp 22" "on wg0" "interfaces.\"wg0\".allowedTCPPorts = [ 22 ]") ];
    };
    # Too much is open then, and nothing of ours shut.
    open-by-a-pattern = {
      module = ownFirewall {
        networking.firewall.interfaces."wg+".allowedTCPPorts = [
          22
          9984
        ];
      };
      errors = [
        (opensOn "wg+" "wg*" "tcp 22, 9984" "tcp")
      ];
    };
    # iptables takes the star for a part of the name; and NixOS' own commands let nothing in.
    open-by-a-pattern-of-nobody = {
      module = ownFirewall { networking.firewall.trustedInterfaces = [ "wg*" ]; };
      errors = [ shutOutOfTheMesh ];
      warnings = [
        "networking.firewall.trustedInterfaces trusts wg*, which is public by the policy"
      ];
    };
    # The module opens it, and somebody else shuts it.
    shut-by-force = {
      module = {
        networking.firewall.interfaces = lib.mkForce { };
      };
      errors = [
        (say [
          "networking.firewall drops tcp 22, 9984 on wg0, which the policy lets in: write"
          "networking.firewall.interfaces.\"wg0\".allowedTCPPorts = [ 22 9984 ]"
        ])
      ];
    };
    shut-tunnel = {
      module = hubWithOwnFirewall {
        # Of another protocol.
        networking.firewall.allowedTCPPorts = [ 51820 ];
        services.spokeguard.settings.public.tcp = [ 51820 ];
      };
      errors = [ (shutOut "udp 51820" "of the tunnel" "allowedUDPPorts = [ 51820 ]") ];
    };
    # Metrics alone are for the mesh.
    shut-outside = {
      module = {
        imports = [
          (onMesh { allowedTCPPorts = [ 9984 ]; })
          (sshOutside [ "203.0.113.5" ])
        ];
      };
      errors = [ (shutOut "tcp 22" "on 203.0.113.5" "allowedTCPPorts = [ 22 ]") ];
    };
    # Its rules are in a table of their own there, and what NixOS' drops is gone.
    tailscale-without-its-rules = {
      module = ownFirewall {
        imports = [ tailscale ];
        networking.nftables.enable = true;
      };
      errors = [ shutOutOfTailscale ];
    };
    firewalld = {
      module = {
        services.firewalld.enable = true;
      };
      errors = [
        (say [
          "services.firewalld is the host's firewall, whose zones the module does not set up: set"
          "manageFirewall = false and open there what the policy names, or set it to false"
        ])
      ];
    };
    flush = {
      module = {
        networking.nftables.ruleset = "table inet mine { }";
      };
      errors = [
        (say [
          "networking.nftables.flushRuleset takes table inet spokeguard away at every rebuild:"
          "put your rules into networking.nftables.tables, and set it to false"
        ])
      ];
    };
    late-nftables = {
      module = {
        systemd.services.nftables.after = [
          "sysinit.target"
          "network-online.target"
        ];
      };
      errors = [
        (say [
          "systemd.services.nftables starts after the network, and the boot unit has to start between"
          "the two, so that systemd would leave one out: take the network out of its after"
        ])
      ];
    };
    same-table = {
      module = {
        networking.nftables.tables.spokeguard = {
          family = "ip";
          content = "";
        };
      };
      errors = [
        (say [
          "networking.nftables.tables.spokeguard has the name of spokeguard's own table: choose"
          "another"
        ])
      ];
    };

    # Secrets and roles.
    secret-in-the-store = {
      module = {
        services.spokeguard.kumaUrlFile = "${builtins.storeDir}/x-kuma";
      };
      errors = [
        (say [
          "kumaUrlFile is in the Nix store, which everybody can read: write a path outside of it,"
          "as a string"
        ])
      ];
    };
    another-profile = {
      module = {
        services.spokeguard.profile = "hub";
        services.spokeguard.settings.node.role = "spoke";
      };
      errors = [
        "profile is \"hub\", and settings.node.role is \"spoke\": write the same in both"
      ];
    };
    spokes-of-a-spoke = {
      module = {
        services.spokeguard.hub.spokes.a = {
          address = [ "10.84.0.2" ];
          publicKey = other;
        };
      };
      errors = [ "hub.spokes are for the hub, and settings.node.role is \"spoke\"" ];
    };
    two-of-one-address = {
      module = {
        services.spokeguard.profile = "hub";
        services.spokeguard.settings.mesh.hub = lib.mkForce null;
        services.spokeguard.settings.ssh.from = "mesh";
        services.spokeguard.hub.spokes.a = {
          address = [ "10.84.0.2" ];
          publicKey = other;
        };
        services.spokeguard.hub.spokes.b = {
          address = [ "10.84.0.2" ];
          publicKey = other;
        };
      };
      errors = [
        "hub.spokes: the address 10.84.0.2 is there twice"
        "hub.spokes: the public key ${other} is there twice"
      ];
    };

    # Unwise.
    no-firewall = {
      module = {
        networking.firewall.enable = false;
      };
      warnings = [ noFirewall ];
    };
    # What it does not name it does not drop.
    no-firewall-at-all = {
      module = {
        services.spokeguard.manageFirewall = false;
        networking.firewall.enable = false;
      };
      warnings = [ noFirewall ];
    };
    no-firewall-for-its-rules = {
      module = {
        services.spokeguard.manageFirewall = false;
        networking.nftables.enable = true;
        networking.firewall.enable = false;
        networking.firewall.extraInputRules = "iifname \"wg0\" accept";
      };
      warnings = [ noFirewall ];
    };
    trusted-outside = {
      module = hubWithOwnFirewall {
        imports = [ (sshOutside [ "203.0.113.5" ]) ];
        services.spokeguard.settings.ssh.from = lib.mkForce [ "198.51.100.0/24" ];
        networking.firewall.trustedInterfaces = [ "eth0" ];
      };
      warnings = [
        "networking.firewall.trustedInterfaces trusts eth0, which is public by the policy"
      ];
    };
    trusted-by-a-pattern = {
      module = ownFirewall {
        networking.nftables.enable = true;
        networking.firewall.trustedInterfaces = [ "wg*" ];
      };
      warnings = [
        "networking.firewall.trustedInterfaces trusts wg*, which is public by the policy"
      ];
    };
    # Who lets the mesh in can't be told.
    input-rules = {
      module = ownFirewall {
        networking.nftables.enable = true;
        networking.firewall.extraInputRules = "iifname \"wg0\" accept";
      };
      warnings = [ (notRead "networking.firewall.extraInputRules") ];
    };
    # Nobody reads them without nftables.
    input-rules-without-nftables = {
      module = ownFirewall { networking.firewall.extraInputRules = "iifname \"wg0\" accept"; };
      errors = [ shutOutOfTheMesh ];
    };
    input-commands = commands "iptables -A nixos-fw -i wg0 -j nixos-fw-accept";
    input-commands-before = commands "iptables -I INPUT -i wg0 -j ACCEPT";
    input-commands-of-a-file = commands "iptables-restore --noflush < /etc/rules";
    input-commands-of-a-script = commands "${builtins.storeDir}/x-rules.sh";
    own-firewalld = {
      module = ownFirewall { services.firewalld.enable = true; };
      warnings = [ (notRead "services.firewalld") ];
    };
    tailscale-and-its-rules = {
      module = ownFirewall tailscale;
      warnings = [
        (say [
          "networking.firewall does not name tcp 22, 9984 on tailscale0, which the policy lets in, and the"
          "rules of tailscaled are not read here: see that they do, or write"
          "networking.firewall.interfaces.\"tailscale0\".allowedTCPPorts = [ 22 9984 ], or set"
          "manageFirewall = true"
        ])
      ];
    };
    no-sshd = {
      module = {
        services.openssh.enable = false;
      };
      warnings = [ noSshd ];
    };
    own-sshd = {
      module = {
        services.spokeguard.manageOpenssh = false;
      };
      warnings = [ noSshd ];
    };
    tailscale-ssh.module = {
      imports = [ tailscale ];
      services.openssh.enable = false;
      services.spokeguard.settings.mesh.tailscale_ssh = true;
    };
    looking-on = {
      module = settings {
        enforce.mode = "audit";
        enforce.firewall = false;
        enforce.allow_no_admin_path = true;
        mesh.keepalive = "off";
      };
      warnings = [
        "enforce.mode is \"audit\": it counts, and drops nothing"
        "enforce.firewall is false: it looks on, and holds nothing"
        "enforce.allow_no_admin_path: this node may end up without a way in"
        "mesh.keepalive is off: behind NAT the hub can't reach this node, once it is silent"
      ];
    };
    no-interface = {
      module = {
        services.spokeguard.wireguard.privateKeyFile = null;
        services.openssh.settings.PasswordAuthentication = true;
        networking.firewall.trustedInterfaces = [
          "wg0"
          "lo"
          "eth1"
        ];
      };
      warnings = [
        "nothing declares the interface wg0: set wireguard.privateKeyFile, or make it yourself"
        "sshd takes passwords (services.openssh.settings.PasswordAuthentication)"
        "networking.firewall.trustedInterfaces trusts eth1, which is public by the policy"
      ];
    };
    no-tailscale = {
      module = {
        services.spokeguard.wireguard.privateKeyFile = null;
        services.spokeguard.settings.mesh = {
          kind = "tailscale";
          hub.public_key = null;
        };
      };
      warnings = [
        "mesh.kind is \"tailscale\", and services.tailscale is off"
      ];
    };
  };

  # The evaluation itself must refuse these.
  broken = {
    port-zero = settings { public.tcp = [ 0 ]; };
    port-too-high = settings { metrics.port = 70000; };
    port-as-text = settings { ssh.port = "22"; };
    role = settings { node.role = "boss"; };
    keepalive = mesh { keepalive = "often"; };
    version = settings { version = 2; };
    bool = settings { enforce.binds = "yes"; };
    url-of-a-path = {
      services.spokeguard.kumaUrlFile = ./cases.nix;
    };
    until = settings {
      exception = [
        {
          name = "x";
          from = [ "::/0" ];
          reason = "x";
          until = "soon";
        }
      ];
    };
    exception-key = settings { exception = [ { nmae = "x"; } ]; };
    option = {
      services.spokeguard.polcy = "/x";
    };
  };
}
