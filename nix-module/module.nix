# services.spokeguard: the policy, the units that keep it, and a host that agrees with it.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  cfg = config.services.spokeguard;
  policy = import ./policy.nix {
    inherit lib pkgs;
    host = config;
  };
  # What the file says with nothing beside it.
  fromFile = builtins.fromTOML (builtins.readFile cfg.policyFile);
  alone =
    (lib.evalModules {
      modules = [
        {
          options.settings = lib.mkOption { inherit (policy) type; };
          config.settings = fromFile;
        }
      ];
    }).config.settings;

  secret =
    what:
    lib.mkOption {
      type = lib.types.nullOr lib.types.str;
      default = null;
      description = ''
        File that holds ${what}. Passed on by systemd (LoadCredential) and never in the store;
        the daemon does not start without it.'';
    };
  manage =
    what:
    lib.mkOption {
      type = lib.types.bool;
      default = true;
      description = "Set up ${what}. Where this is false, contradictions are still errors.";
    };
in
{
  imports = [
    ./checks.nix
    ./host.nix
    ./profiles.nix
    ./units.nix
  ];

  options.services.spokeguard = {
    enable = lib.mkEnableOption "spokeguard, which holds the host to what its policy exposes";
    package = lib.mkPackageOption pkgs "spokeguard" { };

    settings = lib.mkOption {
      inherit (policy) type;
      default = { };
      description = "The policy file, key by key; `spokeguard policy check` judges it during the build.";
    };
    policyFile = lib.mkOption {
      type = lib.types.nullOr lib.types.path;
      default = null;
      description = "A policy file to use as it is, and to set the host up from, in place of `settings`.";
    };
    checkPolicy = lib.mkOption {
      type = lib.types.bool;
      default = true;
      description = "Have the build fail on a policy that is not right (an exception past its day, too).";
    };
    checkPackage = lib.mkOption {
      type = lib.types.nullOr lib.types.package;
      # A host may be built by a machine of another kind, which can't run the host's own program.
      default =
        if pkgs.stdenv.buildPlatform.canExecute pkgs.stdenv.hostPlatform then
          cfg.package
        else
          cfg.package.forBuild or pkgs.buildPackages.spokeguard or null;
      defaultText = lib.literalExpression "package or pkgs.buildPackages.spokeguard";
      description = ''
        The program that checks the policy, for the machine that builds. Null, where there is none: the
        policy is not checked, and a warning says so.'';
    };

    kumaUrlFile = secret "the push URL of Uptime Kuma";
    ntfyUrlFile = secret "the URL of an ntfy topic";

    manageOpenssh = manage "`services.openssh` as the policy says: its addresses only, and no passwords";
    manageFirewall = manage "`networking.firewall` and nftables as the policy says";
    manageWireguard = manage "the WireGuard interface (with `privateKeyFile`) and its peers' keepalive";

    wireguard.privateKeyFile = lib.mkOption {
      type = lib.types.nullOr lib.types.str;
      default = null;
      description = "This node's WireGuard key. With it the mesh interface is made from the policy.";
    };

    profile = lib.mkOption {
      type = lib.types.nullOr (
        lib.types.enum [
          "spoke"
          "hub"
        ]
      );
      default = null;
      description = ''
        `"spoke"`: two generations, weekly garbage collection. `"hub"`: a peer and a scrape a spoke.'';
    };
    hub.spokes = lib.mkOption {
      type = lib.types.attrsOf (
        lib.types.submodule {
          options.address = lib.mkOption {
            type = lib.types.listOf lib.types.str;
            description = "Its addresses in the mesh.";
          };
          options.publicKey = lib.mkOption {
            type = lib.types.singleLineStr;
            description = "Its WireGuard public key.";
          };
        }
      );
      default = { };
      description = "The spokes by name: `address`, `publicKey`.";
    };

    policyText = lib.mkOption {
      type = lib.types.attrsOf lib.types.anything;
      internal = true;
      readOnly = true;
      description = "The policy as the file has it.";
    };
  };

  config = lib.mkIf cfg.enable {
    services.spokeguard.settings = lib.mkMerge [
      (lib.mkIf (cfg.policyFile != null) fromFile)
      (lib.mkIf (cfg.kumaUrlFile != null) {
        heartbeat.kuma_url_file = "/run/credentials/spokeguard.service/kuma-url";
      })
      (lib.mkIf (cfg.ntfyUrlFile != null) {
        heartbeat.ntfy_url_file = "/run/credentials/spokeguard.service/ntfy-url";
      })
    ];
    assertions = [
      {
        assertion = cfg.policyFile == null || cfg.settings == alone;
        message = lib.concatStringsSep " " [
          "services.spokeguard: policyFile is used as it is, and settings, profile or a URL's file say more:"
          "write it into the file, or settings in its place"
        ];
      }
    ];
    services.spokeguard.policyText = policy.said cfg.settings;
  };
}
