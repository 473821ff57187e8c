# The units of contrib/systemd in NixOS's terms: the confirmed rules before any network with nft
# alone, a host that shuts itself where that fails, and the daemon.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  cfg = config.services.spokeguard;
  inherit (cfg.settings) heartbeat mesh;
  nft = lib.getExe' pkgs.nftables "nft";

  text =
    if cfg.policyFile != null then
      cfg.policyFile
    else
      (pkgs.formats.toml { }).generate "spokeguard-policy.toml" cfg.policyText;
  policy =
    if cfg.checkPolicy && cfg.checkPackage != null then
      pkgs.runCommand "spokeguard-policy-checked.toml" { nativeBuildInputs = [ cfg.checkPackage ]; } ''
        spokeguard policy check --policy ${text}
        cp ${text} $out
      ''
    else
      text;

  shut = pkgs.writeText "spokeguard-shut.nft" (
    builtins.replaceStrings
      [
        ''iifname "tailscale*" accept''
        "41641, 51820"
      ]
      [
        "iifname \"tailscale*\" accept\n\t\tiifname \"${mesh.interface}\" accept"
        (lib.concatMapStringsSep ", " toString (
          lib.unique (
            [
              41641
              51820
            ]
            ++ lib.optional (mesh.listen_port != null) mesh.listen_port
          )
        ))
      ]
      (builtins.readFile ../contrib/systemd/shut.nft)
  );

  sandbox = {
    NoNewPrivileges = true;
    MemoryDenyWriteExecute = true;
    LockPersonality = true;
    RestrictNamespaces = true;
    RestrictRealtime = true;
    RestrictSUIDSGID = true;
    SystemCallArchitectures = "native";
  };
  # What nft alone needs, at boot. No view of its own of the file system, so that at a boot nothing hangs
  # on systemd being able to make one (by version 252 in /tmp, which somebody may empty meanwhile).
  loader = commands: {
    Type = "oneshot";
    RemainAfterExit = true;
    ExecStart = commands;
    TimeoutStartSec = 30;
    CapabilityBoundingSet = "CAP_NET_ADMIN";
    RestrictAddressFamilies = "AF_NETLINK AF_UNIX";
    SystemCallFilter = "@system-service";
  };
  # A rebuild restarts sshd before it starts what is new, such as its address.
  tunnel =
    lib.optional
      (
        config.networking.wireguard.interfaces ? ${mesh.interface}
        && !(config.networking.wireguard.useNetworkd or false)
      )
      "wireguard-${mesh.interface}.service";
  early = {
    documentation = [ "man:spokeguard(1)" ];
    wants = [ "network-pre.target" ];
    before = [
      "network-pre.target"
      # Comes before that target, too, and asks for an address by DHCP; dhcpcd does not wait for it.
      "cloud-init-local.service"
      "dhcpcd.service"
      "shutdown.target"
    ];
    conflicts = [ "shutdown.target" ];
    # Once a boot: a rebuild must not put back what was confirmed before what is in force now.
    restartIfChanged = false;
  };
in
{
  config = lib.mkIf cfg.enable {
    # Where every command looks for it.
    environment.etc."spokeguard/policy.toml".source = policy;
    environment.etc."spokeguard/shut.nft".source = shut;
    environment.systemPackages = [
      cfg.package
      pkgs.nftables
    ];

    systemd.services.spokeguard-boot = early // {
      description = "The confirmed rules of spokeguard, before any network";
      wantedBy = [ "sysinit.target" ];
      after = [
        "systemd-modules-load.service"
        "local-fs.target"
        # Who loads its rules by flushing all others does so before.
        "nftables.service"
        "netfilter-persistent.service"
      ];
      unitConfig = {
        DefaultDependencies = false;
        RequiresMountsFor = "/var/lib/spokeguard";
        OnFailure = "spokeguard-shut.service";
        ConditionPathExists = [
          # Every rebuild starts sysinit.target again, and with it what did not run at boot: the
          # daemon that was there since then knows better what is in force.
          "!/run/spokeguard"
          "|/var/lib/spokeguard/sealed.nft"
          "|/var/lib/spokeguard/confirmed.toml"
        ];
      };
      serviceConfig = sandbox // loader "${nft} -f /var/lib/spokeguard/sealed.nft";
    };

    systemd.services.spokeguard-shut = early // {
      description = "Shut the host until spokeguard's rules are back";
      after = [
        "systemd-modules-load.service"
        "nftables.service"
        "netfilter-persistent.service"
      ];
      unitConfig.DefaultDependencies = false;
      serviceConfig =
        sandbox
        // loader [
          "${nft} -f ${shut}"
          # The tunnel of the policy that was confirmed last, where that can still be read.
          "-${nft} -f /var/lib/spokeguard/tunnel.nft"
        ];
    };

    systemd.services.spokeguard = {
      description = "spokeguard: what the internet and the mesh may reach";
      documentation = [ "man:spokeguard(1)" ];
      wantedBy = [ "multi-user.target" ];
      after = [ "spokeguard-boot.service" ];
      # The way back from rules on trial runs with this path, too.
      path = [ pkgs.nftables ];
      # A changed policy is taken up, on trial; only a changed program or unit restarts, and adopts.
      reloadTriggers = [ policy ];
      stopIfChanged = false;
      unitConfig.StartLimitIntervalSec = 0;
      unitConfig.ConditionPathExists = [
        "|/etc/spokeguard/policy.toml"
        "|/var/lib/spokeguard/confirmed.toml"
      ];
      serviceConfig = sandbox // {
        Type = "notify";
        NotifyAccess = "main";
        ExecStartPre = "-+${lib.getExe' pkgs.coreutils "mkdir"} -p -m 700 /sys/fs/bpf/spokeguard";
        ExecStart = "${lib.getExe' cfg.package "spokeguard"} run";
        ExecReload = "${lib.getExe' pkgs.coreutils "kill"} -HUP $MAINPID";
        Restart = "always";
        RestartSec = 5;
        WatchdogSec = 60;
        TimeoutStartSec = 60;
        # Rules stay when the daemon goes, and so does what keeps the way back.
        KillMode = "process";
        StateDirectory = "spokeguard";
        StateDirectoryMode = "0700";
        RuntimeDirectory = "spokeguard";
        RuntimeDirectoryMode = "0700";
        RuntimeDirectoryPreserve = true;
        MemoryMax = "32M";
        MemorySwapMax = 0;
        TasksMax = 64;
        LimitNOFILE = 4096;
        UMask = "0077";
        CapabilityBoundingSet = lib.concatStringsSep " " [
          "CAP_NET_ADMIN"
          "CAP_NET_RAW"
          "CAP_BPF"
          "CAP_PERFMON"
          "CAP_SYS_PTRACE"
          "CAP_DAC_READ_SEARCH"
          "CAP_NET_BIND_SERVICE"
        ];
        ProtectSystem = "strict";
        ProtectHome = "read-only";
        PrivateDevices = true;
        ProtectControlGroups = true;
        ProtectKernelLogs = true;
        ProtectClock = true;
        ProtectHostname = true;
        PrivateTmp = true;
        PrivateMounts = true;
        ProtectKernelTunables = true;
        ReadWritePaths =
          "-/sys/fs/bpf/spokeguard -/proc/sys/net"
          + lib.optionalString (heartbeat.status_file != null) " -${builtins.dirOf heartbeat.status_file}";
        ProtectKernelModules = true;
        RestrictAddressFamilies = "AF_NETLINK AF_INET AF_INET6 AF_UNIX AF_PACKET";
        SystemCallFilter = [
          "@system-service bpf seccomp landlock_create_ruleset landlock_add_rule landlock_restrict_self"
          "~@resources"
        ];
        SystemCallErrorNumber = "EPERM";
        # Without a file of their own: from /etc/credstore, where they are there.
        LoadCredential = [
          (if cfg.kumaUrlFile != null then "kuma-url:${cfg.kumaUrlFile}" else "kuma-url")
          (if cfg.ntfyUrlFile != null then "ntfy-url:${cfg.ntfyUrlFile}" else "ntfy-url")
        ];
      };
    };

    # A mesh address may come late: sshd waits for it instead of giving up.
    systemd.services.sshd =
      lib.mkIf (config.services.openssh.enable && !config.services.openssh.startWhenNeeded)
        {
          after = [ "spokeguard-boot.service" ] ++ tunnel;
          wants = tunnel;
          unitConfig.StartLimitIntervalSec = 0;
          serviceConfig.Restart = "always";
          serviceConfig.RestartSec = lib.mkDefault 2;
        };
    systemd.sockets.sshd =
      lib.mkIf (config.services.openssh.enable && config.services.openssh.startWhenNeeded)
        {
          socketConfig.FreeBind = true;
        };
  };
}
